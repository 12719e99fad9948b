{{/* (list DEFAULTS OWN): the defaults, and over them what the set says itself, empty values included. */}}
{{- define "headrace.workerSet" -}}
{{- $set := deepCopy (index . 0) -}}
{{- range $key, $value := index . 1 -}}
{{- if and (kindIs "map" $value) (kindIs "map" (index $set $key)) (ne $key "resources") -}}
{{- $_ := set $set $key (include "headrace.workerSet" (list (index $set $key) $value) | fromYaml) -}}
{{- else -}}
{{- $_ := set $set $key $value -}}
{{- end -}}
{{- end -}}
{{ toYaml $set }}
{{- end }}

{{/* Devices and hugepages are limits that are requests, too. */}}
{{- define "headrace.workerResources" -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- $requests := deepCopy (default dict .resources.requests) -}}
{{- if gt (int .gpu.count) 0 }}{{ $_ := set $limits .gpu.resource (int .gpu.count) }}{{ $_ := set $requests .gpu.resource (int .gpu.count) }}{{ end -}}
{{- if .rdma.enabled }}{{ $_ := set $limits .rdma.resource (int .rdma.count) }}{{ $_ := set $requests .rdma.resource (int .rdma.count) }}{{ end -}}
{{- if .hugepages.amount }}{{ $key := printf "hugepages-%s" .hugepages.size }}{{ $_ := set $limits $key .hugepages.amount }}{{ $_ := set $requests $key .hugepages.amount }}{{ end -}}
{{ toYaml (dict "limits" $limits "requests" $requests) }}
{{- end }}

{{- define "headrace.hpa" }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  labels: {{ include "headrace.labels" .root | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ .of.min }}
  maxReplicas: {{ .of.max }}
  metrics:
    - type: Pods
      pods:
        metric: {name: {{ .of.metric | quote }}}
        target: {type: AverageValue, averageValue: {{ .of.target | quote }}}
  behavior: # a worker that ends takes its cache with it
    scaleDown:
      stabilizationWindowSeconds: {{ .of.scaleDownS }}
      policies: [{type: Pods, value: 1, periodSeconds: 60}]
{{- end }}

{{- define "headrace.keda" }}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  labels: {{ include "headrace.labels" .root | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ .name }}}
  minReplicaCount: {{ .of.min }}
  maxReplicaCount: {{ .of.max }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior: # a worker that ends takes its cache with it
        scaleDown:
          stabilizationWindowSeconds: {{ .of.scaleDownS }}
          policies: [{type: Pods, value: 1, periodSeconds: 60}]
  triggers:
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ .of.prometheus | quote }}
        query: {{ printf "sum(%s{job=\"headrace-worker\",namespace=%q,fleet=%q,worker_set=%q})" .of.metric .root.Release.Namespace .root.Release.Name .set | quote }}
        threshold: {{ .of.target | quote }}
{{- end }}
