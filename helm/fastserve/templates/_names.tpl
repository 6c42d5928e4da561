{{/* Values over defaults.yaml: what an older release lacks, or somebody set to null, has its default. */}}
{{- define "fastserve.values" -}}
{{- mergeOverwrite (.Files.Get "defaults.yaml" | fromYaml) (deepCopy (omit .Values "global")) | toYaml -}}
{{- end -}}

{{/* Labels of every object; pass (dict "root" $ "part" "gateway"). */}}
{{- define "fastserve.labels" -}}
{{ include "fastserve.selector" . }}
app.kubernetes.io/part-of: fastserve
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_") }}
{{- end -}}

{{/* Labels by which pods are found; they never change. */}}
{{- define "fastserve.selector" -}}
app.kubernetes.io/name: fastserve
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{/* An image of values: by digest where there is one. Pass (dict "root" $ "image" $v.image). */}}
{{- define "fastserve.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* What Pod Security "restricted" asks of a pod, and of a container. */}}
{{- define "fastserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .podSecurity.runAsUser | int64 }}
runAsGroup: {{ .podSecurity.runAsUser | int64 }}
fsGroup: {{ .podSecurity.fsGroup | int64 }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "fastserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "fastserve.pullSecrets" -}}
{{- with .image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "fastserve.place" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The artifact store: how a container reads it, and the volume behind a folder. */}}
{{- define "fastserve.onClaim" -}}
{{- if or .store.claimName (not (hasPrefix "s3://" .store.uri)) -}}yes{{- end -}}
{{- end -}}

{{- define "fastserve.storeMount" -}}
{{- if include "fastserve.onClaim" . }}
- {name: store, mountPath: /store}
{{- end }}
{{- end -}}

{{- define "fastserve.storeVolume" -}}
{{- if include "fastserve.onClaim" . }}
- name: store
  persistentVolumeClaim: {claimName: {{ .store.claimName | default "fastserve-store" | quote }}}
{{- end }}
{{- end -}}

{{- define "fastserve.storeEnv" -}}
{{- with .store.secretName }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{/* The Secret with Ray's token. */}}
{{- define "fastserve.tokenSecret" -}}
{{ .ray.tokenSecretName | default "fastserve-ray-token" }}
{{- end -}}
