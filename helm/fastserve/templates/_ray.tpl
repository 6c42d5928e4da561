{{/* A RayCluster without a name; the operator gives it one. Pass (dict "root" $ "v" $v). How many machines run is the
autoscaler's to say, so it does not stand here. */}}
{{- define "fastserve.rayCluster" -}}
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  labels: {{- include "fastserve.rayLabels" "ray" | nindent 4 }}
spec:
  rayVersion: {{ $.v.ray.version | quote }}
  enableInTreeAutoscaling: true
  autoscalerOptions:
    version: v2
    idleTimeoutSeconds: {{ $.v.ray.idleTimeoutSeconds | int64 }}
    imagePullPolicy: {{ $.v.image.pullPolicy }}
    resources: {{- toYaml $.v.ray.autoscaler.resources | nindent 6 }}
    securityContext: {{- include "fastserve.containerSecurity" $.v | nindent 6 }}
    env: {{- include "fastserve.rayEnv" $.v | nindent 6 }}
    volumeMounts:
      {{- include "fastserve.rayMounts" $.v | nindent 6 }}
      - {name: api-access, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
  headGroupSpec:
    rayStartParams: {{- include "fastserve.rayStart" (dict "v" $.v "head" true) | nindent 6 }}
    template: {{- include "fastserve.rayPod" (dict "root" $.root "v" $.v "part" "ray-head" "resources" $.v.ray.head.resources "place" $.v.ray.head) | nindent 6 }}
  {{- if $.v.ray.profiles }}
  workerGroupSpecs:
    {{- range $.v.ray.profiles }}
    {{- $cpus := .cpus | int64 }}
    {{- $amounts := dict "cpu" $cpus "memory" .memory }}
    {{- with .accelerator }}
    {{- $_ := set $amounts .resource (.count | default 1 | int64) }}
    {{- end }}
    - groupName: {{ .name | quote }}
      {{- $min := .min | default 0 | int64 }}
      {{- $max := ternary .max 10 (hasKey . "max") | int64 }}
      minReplicas: {{ $min }}
      maxReplicas: {{ $max }}
      labels: {fastserve.dev/profile: {{ .name | quote }}}
      rayStartParams: {{- include "fastserve.rayStart" (dict "v" $.v "head" false) | default "{}" | nindent 8 }}
      template: {{- include "fastserve.rayPod" (dict "root" $.root "v" $.v "part" "ray-worker" "resources" (dict "requests" $amounts "limits" $amounts) "place" .) | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end -}}

{{/* Labels of Ray's objects. No version of the chart is among them: a RayCluster is replaced when what it is made from
changes, and a new chart with the same image is no reason for that. */}}
{{- define "fastserve.rayLabels" -}}
{{ include "fastserve.selector" (dict "part" .) }}
app.kubernetes.io/part-of: fastserve
{{- end -}}

{{/* A Ray pod. Pass (dict "root" $ "v" $v "part" "ray-head" "resources" {...} "place" {...}). */}}
{{- define "fastserve.rayPod" -}}
metadata:
  labels: {{- include "fastserve.rayLabels" .part | nindent 4 }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "fastserve.podSecurity" .v | nindent 4 }}
  {{- include "fastserve.pullSecrets" .v | nindent 2 }}
  {{- include "fastserve.place" .place | nindent 2 }}
  containers:
    - name: {{ .part }}
      image: {{ include "fastserve.image" (dict "root" .root "image" .v.ray.image) }}
      imagePullPolicy: {{ .v.image.pullPolicy }}
      env:
        {{- $named := list }}
        {{- range .v.ray.extraEnv }}
        {{- $named = append $named .name }}
        {{- end }}
        {{- if and (eq .part "ray-worker") (not (has "RAY_gcs_rpc_server_reconnect_timeout_s" $named)) }}
        # A head that was lost does not come back as what it was: its machines end after this, and new ones take their
        # place. Ray waits 60 s.
        - {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "20"}
        {{- end }}
        {{- include "fastserve.rayEnv" .v | nindent 8 }}
        - {name: FASTSERVE_TOKENS, value: /etc/fastserve/tokens}
        {{- if and (eq .part "ray-worker") .v.ray.warmEngines (not .place.accelerator) }}
        - {name: FASTSERVE_ENGINES, value: /tmp/engines}
        {{- end }}
      {{- include "fastserve.storeEnv" .v | nindent 6 }}
      {{- if eq .part "ray-head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: serve, containerPort: 8000}
      {{- end }}
      resources: {{- toYaml .resources | nindent 8 }}
      securityContext: {{- include "fastserve.containerSecurity" .v | nindent 8 }}
      volumeMounts:
        {{- include "fastserve.rayMounts" .v | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- range $at, $name := .v.ray.tokenSecrets }}
        - {name: token-{{ $at }}, mountPath: {{ printf "/etc/fastserve/tokens/%s" $name | quote }}, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .v.ray.sharedMemory }}}}
    {{- if eq .part "ray-head" }}
    # What Kubernetes would mount into every container; here the autoscaler alone has it, not the stages beside it.
    - name: api-access
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3607}
          - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
          - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
    {{- end }}
    {{- include "fastserve.storeVolume" .v | nindent 4 }}
    {{- include "fastserve.sourceVolumes" .v | nindent 4 }}
    {{- range $at, $name := .v.ray.tokenSecrets }}
    - {name: token-{{ $at }}, secret: {secretName: {{ $name | quote }}, optional: true}}
    {{- end }}
    {{- with .v.ray.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Environment and mounts of every container of Ray's image, the autoscaler's too. */}}
{{- define "fastserve.rayEnv" -}}
- {name: HOME, value: /tmp}
{{- include "fastserve.rayToken" . | nindent 0 }}
- {name: FASTSERVE_SOURCES, value: /sources}
{{- with .ray.extraEnv }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{- define "fastserve.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- include "fastserve.storeMount" . }}
{{- include "fastserve.sourceMounts" . }}
{{- with .ray.extraVolumeMounts }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{/* The claims that manifests name as pvc://CLAIM/path, each in a folder of its name. */}}
{{- define "fastserve.sourceMounts" -}}
{{- range $at, $claim := .ray.sourceClaims }}
- {name: source-{{ $at }}, mountPath: {{ printf "/sources/%s" $claim | quote }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "fastserve.sourceVolumes" -}}
{{- range $at, $claim := .ray.sourceClaims }}
- {name: source-{{ $at }}, persistentVolumeClaim: {claimName: {{ $claim | quote }}, readOnly: true}}
{{- end }}
{{- end -}}

{{/* Whoever reaches a head without a token runs any code there. */}}
{{- define "fastserve.rayToken" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "fastserve.tokenSecret" . | quote }}, key: auth_token}}
{{- end -}}

{{- define "fastserve.rayStart" -}}
{{- with .v.ray.objectStoreBytes | int64 }}
object-store-memory: {{ printf "%d" . | quote }}
{{- end }}
{{- if .head }}
num-cpus: "0"
dashboard-host: 0.0.0.0
{{- end }}
{{- end -}}
