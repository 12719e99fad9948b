{{/* What every member is told about etcd, NATS and streams: variables, and the files that they name. */}}
{{- define "headrace.planeEnv" -}}
- {name: HEADRACE_NAMESPACE, value: {{ .Values.namespace | quote }}}
- {name: HEADRACE_LOG_JSON, value: {{ .Values.logJson | quote }}}
- {name: HEADRACE_ETCD, value: {{ include "headrace.etcdUrl" . | quote }}}
- {name: HEADRACE_NATS, value: {{ include "headrace.natsUrl" . | quote }}}
{{- if .Values.security.insecure }}
- {name: HEADRACE_INSECURE, value: "true"}
{{- end }}
{{- if include "headrace.memberSecret" . }}
- {name: HEADRACE_PLANE_CA, value: /etc/headrace/planes/ca.crt}
- {name: HEADRACE_PLANE_CERT, value: /etc/headrace/planes/tls.crt}
- {name: HEADRACE_PLANE_KEY, value: /etc/headrace/planes/tls.key}
{{- end }}
{{- if .Values.security.streamToken.name }}
- {name: HEADRACE_STREAM_TOKEN_FILE, value: /etc/headrace/stream-token}
{{- end }}
{{- if not .Values.etcd.enabled }}
{{- with .Values.etcd.external }}
{{- if .user }}
- {name: HEADRACE_ETCD_USER, value: {{ .user | quote }}}
{{- end }}
{{- if .passwordSecret.name }}
- {name: HEADRACE_ETCD_PASSWORD_FILE, value: /etc/headrace/etcd-password}
{{- end }}
{{- if .caSecret.name }}
- {name: HEADRACE_ETCD_CA, value: /etc/headrace/etcd-ca.crt}
{{- end }}
{{- end }}
{{- end }}
{{- if not .Values.nats.enabled }}
{{- with .Values.nats.external }}
{{- if .user }}
- {name: HEADRACE_NATS_USER, value: {{ .user | quote }}}
{{- end }}
{{- range $variable, $secret := include "headrace.natsSecrets" . | fromYaml }}
- {name: HEADRACE_NATS_{{ $variable }}, value: /etc/headrace/{{ $secret.path }}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "headrace.natsSecrets" -}}
{{- if .passwordSecret.name }}
PASSWORD_FILE: {path: nats-password, name: {{ .passwordSecret.name }}, key: {{ .passwordSecret.key }}}
{{- end }}
{{- if .tokenSecret.name }}
TOKEN_FILE: {path: nats-token, name: {{ .tokenSecret.name }}, key: {{ .tokenSecret.key }}}
{{- end }}
{{- if .nkeySecret.name }}
NKEY_FILE: {path: nats-nkey, name: {{ .nkeySecret.name }}, key: {{ .nkeySecret.key }}}
{{- end }}
{{- if .credentialsSecret.name }}
CREDENTIALS_FILE: {path: nats-credentials, name: {{ .credentialsSecret.name }}, key: {{ .credentialsSecret.key }}}
{{- end }}
{{- if .caSecret.name }}
CA: {path: nats-ca.crt, name: {{ .caSecret.name }}, key: {{ .caSecret.key }}}
{{- end }}
{{- end }}

{{/* Sources of the volume at /etc/headrace. A Secret that changes is read anew, without a restart. */}}
{{- define "headrace.planeFiles" -}}
{{- with include "headrace.memberSecret" . }}
- secret:
    name: {{ . }}
    items:
      - {key: ca.crt, path: planes/ca.crt}
      - {key: tls.crt, path: planes/tls.crt}
      - {key: tls.key, path: planes/tls.key}
{{- end }}
{{- with .Values.security.streamToken }}
{{- include "headrace.file" (list . "stream-token") }}
{{- end }}
{{- if not .Values.etcd.enabled }}
{{- include "headrace.file" (list .Values.etcd.external.passwordSecret "etcd-password") }}
{{- include "headrace.file" (list .Values.etcd.external.caSecret "etcd-ca.crt") }}
{{- end }}
{{- if not .Values.nats.enabled }}
{{- range include "headrace.natsSecrets" .Values.nats.external | fromYaml }}
{{- include "headrace.file" (list . .path) }}
{{- end }}
{{- end }}
{{- end }}

{{/* (list SECRET PATH): one file, if the secret has a name. */}}
{{- define "headrace.file" -}}
{{- $secret := index . 0 -}}
{{- if $secret.name }}
- secret:
    name: {{ $secret.name }}
    items: [{key: {{ $secret.key }}, path: {{ index . 1 }}}]
{{- end }}
{{- end }}

{{/* Why this release would let strangers in; empty if it would not. */}}
{{- define "headrace.refuseOpen" -}}
{{- if not .Values.security.insecure }}
{{- $member := include "headrace.memberSecret" . }}
{{- $server := include "headrace.serverSecret" . }}
{{- if and (not $member) (not .Values.security.streamToken.name) }}
{{- fail "workers' streams are open: set security.planes.certManager.enabled, or security.planes.memberSecret, or security.streamToken.name (or take the risk: security.insecure=true)" }}
{{- end }}
{{- if and (or .Values.etcd.enabled .Values.nats.enabled) (not (and $member $server)) }}
{{- fail "etcd and NATS of this chart are open: set security.planes.certManager.enabled, or security.planes.memberSecret and .serverSecret (or take the risk: security.insecure=true)" }}
{{- end }}
{{- if not (or .Values.gateway.apiKeys .Values.gateway.apiKeysFile.name) }}
{{- fail "whoever reaches the gateway may ask without a key: set gateway.apiKeys=true or gateway.apiKeysFile.name (or take the risk: security.insecure=true)" }}
{{- end }}
{{- if and (not .Values.etcd.enabled) (not (hasPrefix "https://" .Values.etcd.external.url)) }}
{{- fail (printf "etcd.external.url is %q: it must begin with https:// (or take the risk: security.insecure=true)" .Values.etcd.external.url) }}
{{- end }}
{{- if and (not .Values.nats.enabled) (not (hasPrefix "tls://" .Values.nats.external.url)) }}
{{- fail (printf "nats.external.url is %q: it must begin with tls:// (or take the risk: security.insecure=true)" .Values.nats.external.url) }}
{{- end }}
{{- end }}
{{- if and (not .Values.etcd.enabled) (not .Values.etcd.external.url) }}{{ fail "etcd.enabled is false and etcd.external.url is empty" }}{{ end }}
{{- if and (not .Values.nats.enabled) (not .Values.nats.external.url) }}{{ fail "nats.enabled is false and nats.external.url is empty" }}{{ end }}
{{- if and .Values.security.planes.certManager.enabled (not .Values.security.planes.certManager.issuerRef.name) }}{{ fail "security.planes.certManager.issuerRef.name is empty" }}{{ end }}
{{- end }}
