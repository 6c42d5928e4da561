{{/* A Ray pod. Pass (dict "root" $ "v" $v "part" "ray-head" "resources" {...} "place" {...}). */}}
{{- define "fastserve.rayPod" -}}
metadata:
  labels: {{- include "fastserve.labels" (dict "root" .root "part" .part) | nindent 4 }}
spec:
  {{- if eq .part "ray-worker" }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  securityContext: {{- include "fastserve.podSecurity" .v | nindent 4 }}
  {{- include "fastserve.pullSecrets" .v | nindent 2 }}
  {{- include "fastserve.place" .place | nindent 2 }}
  containers:
    - name: {{ .part }}
      image: {{ include "fastserve.image" (dict "root" .root "image" .v.ray.image) }}
      imagePullPolicy: {{ .v.image.pullPolicy }}
      env:
        - {name: HOME, value: /tmp}
        {{- include "fastserve.rayToken" .v | nindent 8 }}
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
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- include "fastserve.storeMount" .v | nindent 8 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .v.ray.sharedMemory }}}}
    {{- include "fastserve.storeVolume" .v | nindent 4 }}
{{- end -}}

{{/* Whoever reaches a head without a token runs any code there. */}}
{{- define "fastserve.rayToken" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "fastserve.tokenSecret" . }}, key: auth_token}}
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
