{{- define "headrace.name" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Of everything that the release installs. */}}
{{- define "headrace.labels" -}}
{{ include "headrace.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Of every pod of the fleet. Add app.kubernetes.io/component for one kind. */}}
{{- define "headrace.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "headrace.image" -}}
{{ .image.repository }}:{{ default .tag .image.tag }}
{{- end }}

{{- define "headrace.memberSecret" -}}
{{- if .Values.security.planes.certManager.enabled }}{{ include "headrace.name" . }}-member{{ else }}{{ .Values.security.planes.memberSecret }}{{ end -}}
{{- end }}

{{- define "headrace.serverSecret" -}}
{{- if .Values.security.planes.certManager.enabled }}{{ include "headrace.name" . }}-server{{ else }}{{ .Values.security.planes.serverSecret }}{{ end -}}
{{- end }}

{{- define "headrace.etcdUrl" -}}
{{- if .Values.etcd.enabled -}}
{{ if include "headrace.serverSecret" . }}https{{ else }}http{{ end }}://{{ include "headrace.name" . }}-etcd.{{ .Release.Namespace }}.svc:2379
{{- else -}}
{{ .Values.etcd.external.url }}
{{- end -}}
{{- end }}

{{- define "headrace.natsUrl" -}}
{{- if .Values.nats.enabled -}}
{{ if include "headrace.serverSecret" . }}tls{{ else }}nats{{ end }}://{{ include "headrace.name" . }}-nats.{{ .Release.Namespace }}.svc:4222
{{- else -}}
{{ .Values.nats.external.url }}
{{- end -}}
{{- end }}

{{/* A pod's own: nobody needs to be root, to write to the root file system or to ask the API server. */}}
{{- define "headrace.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "headrace.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
