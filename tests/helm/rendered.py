"""The chart, rendered by helm for each values file beside this one: `make helm-test`, which brings helm along.

Resources of Kubernetes are held against its own schemas, strictly; those of operators (cert-manager, Prometheus, KEDA),
for which there are none here, against what is asserted below.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate  # type: ignore[import-not-found] # `make helm-test` brings it
import pytest
import yaml

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "docker" / "helm" / "headrace"
HELM = os.environ.get("HELM") or shutil.which("helm") or "helm"
EXAMPLES = sorted(path.stem for path in HERE.glob("*.yaml"))
KUBERNETES = ("1.27", "1.37")
"""The oldest that Chart.yaml allows, and the newest that there are schemas of."""
FOREIGN = {"Certificate", "PodMonitor", "PrometheusRule", "ScaledObject"}


def helm(*words):
    return subprocess.run([HELM, *words], capture_output=True, text=True, timeout=60, check=False)


def render(example, *more):
    done = helm("template", "fleet", str(CHART), "-n", "serving", "-f", str(HERE / f"{example}.yaml"), *more)
    assert done.returncode == 0, done.stderr
    found = [resource for resource in yaml.safe_load_all(done.stdout) if resource is not None]
    return {
        (resource["kind"], resource["metadata"]["name"].removeprefix("fleet-headrace-")): resource for resource in found
    }


def pod(resource):
    return resource["spec"]["template"]["spec"]


def pods(resources):
    return {
        name: pod(resource) for (kind, name), resource in resources.items() if kind in ("Deployment", "StatefulSet")
    }


def env(resource):
    return {entry["name"]: entry.get("value") for entry in pod(resource)["containers"][0]["env"]}


@pytest.mark.parametrize("example", EXAMPLES)
def test_helm_finds_nothing_wrong(example):
    done = helm("lint", "--strict", str(CHART), "-f", str(HERE / f"{example}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_resources_are_what_kubernetes_takes(example, version):
    resources = render(example)
    assert resources
    for (kind, name), resource in resources.items():
        if kind not in FOREIGN:
            kubernetes_validate.validate(resource, version, strict=True)
        assert len(name) <= 63


def test_a_wrong_resource_would_be_found():
    gateway = render("minimal")["Deployment", "gateway"]
    gateway["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(gateway, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "workers' streams are open"),
        (["security.streamToken.name=t"], "etcd and NATS of this chart are open"),
        (["security.planes.memberSecret=m"], "etcd and NATS of this chart are open"),
        (["security.planes.memberSecret=m", "security.planes.serverSecret=s",
          "gateway.apiKeys=false"], "without a key"),
        (["security.planes.certManager.enabled=true"], "issuerRef.name is empty"),
        (["security.planes.memberSecret=m", "security.planes.serverSecret=s", "etcd.enabled=false",
          "etcd.external.url=http://e:2379"], "must begin with https://"),
        (["security.planes.memberSecret=m", "security.planes.serverSecret=s", "nats.enabled=false",
          "nats.external.url=nats://n:4222"], "must begin with tls://"),
        (["security.insecure=true", "nats.enabled=false"], "nats.external.url is empty"),
        (["security.insecure=true", "worker.gpus=2"], "gpus"),
    ],
)  # fmt: skip
def test_what_would_be_open_or_is_misspelt_is_not_installed(values, reason):
    done = helm("template", "fleet", str(CHART), *(word for value in values for word in ("--set", value)))
    assert done.returncode != 0
    assert reason in done.stderr


@pytest.mark.parametrize("example", EXAMPLES)
def test_pods_have_no_more_rights_than_they_need(example):
    for name, spec in pods(render(example)).items():
        (container,) = spec["containers"]
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        added = container["securityContext"]["capabilities"].pop("add", [])
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert added == (["IPC_LOCK"] if example == "rdma" and name in ("prefill", "decode") else [])


@pytest.mark.parametrize("example", EXAMPLES)
def test_nobody_is_killed_before_its_drain_is_over(example):
    for (kind, name), resource in render(example, "--set", "gateway.drainS=300,worker.drainS=200").items():
        if kind != "Deployment":
            continue
        told = env(resource)
        needed = float(told["HEADRACE_DRAIN_S"]) + float(told.get("HEADRACE_DRAIN_DELAY_S", 0))
        assert pod(resource)["terminationGracePeriodSeconds"] > needed, name


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_file_that_a_process_is_told_is_mounted(example):
    for name, spec in pods(render(example)).items():
        told = [entry.get("value") or "" for entry in spec["containers"][0].get("env", [])]
        sources = [
            source["secret"]
            for volume in spec["volumes"]
            for source in volume.get("projected", {}).get("sources") or []
        ]
        mounted = {f"/etc/headrace/{item['path']}" for source in sources for item in source["items"]}
        assert {value for value in told if value.startswith("/etc/headrace/")} == mounted - {""}, name


def test_insecure_is_said_to_processes_only_if_it_was_said_to_the_chart():
    assert env(render("minimal")["Deployment", "gateway"])["HEADRACE_INSECURE"] == "true"
    for example in EXAMPLES:
        if example != "minimal":
            assert not any("HEADRACE_INSECURE" in str(spec) for spec in pods(render(example)).values())


def test_secured_servers_ask_for_certificates():
    resources = render("secured")
    for plane, asks in (("etcd", "--client-cert-auth"), ("nats", "--tlsverify")):
        assert asks in pod(resources["StatefulSet", plane])["containers"][0]["command"]
    told = env(resources["Deployment", "decode"])
    host = re.fullmatch(r"https://([\w.-]+):2379", told["HEADRACE_ETCD"])
    assert host is not None
    assert host[1] in resources["Certificate", "server"]["spec"]["dnsNames"]
    assert (
        told["HEADRACE_NATS"].removeprefix("tls://").removesuffix(":4222")
        in resources["Certificate", "server"]["spec"]["dnsNames"]
    )
    assert set(resources["Certificate", "member"]["spec"]["usages"]) == {
        "digital signature",
        "server auth",
        "client auth",
    }
    assert "client auth" not in resources["Certificate", "server"]["spec"]["usages"]


def test_who_may_speak_to_whom():
    resources = render("secured")
    rules = {
        name: resource["spec"]["ingress"] for (kind, name), resource in resources.items() if kind == "NetworkPolicy"
    }
    told = {
        name: [
            (
                [port["port"] for port in rule.get("ports", [])],
                sorted(
                    (peer.get("podSelector") or peer["namespaceSelector"])["matchLabels"].get(
                        "app.kubernetes.io/component", "other"
                    )
                    for peer in rule["from"]
                ),
            )
            for rule in own
        ]
        for name, own in rules.items()
    }
    assert told == {
        "gateway": [(["http"], ["other"]), (["admin"], ["other"])],
        "worker": [([], ["worker"]), (["stream"], ["gateway"]), (["metrics"], ["other"])],
        "etcd": [(["client"], ["gateway", "worker"])],
        "nats": [(["client"], ["gateway", "worker"])],
    }


def test_a_set_may_say_anything_of_its_own_nothing_included():
    resources = render("rdma")
    prefill, both = (pod(resources["Deployment", name])["containers"][0] for name in ("prefill", "both"))
    limits = prefill["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 8, "rdma/hca_shared_devices_a": 8, "hugepages-2Mi": "4Gi", "memory": "64Gi"}
    assert prefill["resources"]["requests"].items() >= {"nvidia.com/gpu": 8, "hugepages-2Mi": "4Gi"}.items()
    assert set(both["resources"]["limits"]) == {"hugepages-2Mi", "memory"}
    assert both["image"] == "headrace/worker:sim"
    told = env(resources["Deployment", "both"])
    assert not {"HEADRACE_MODEL", "HEADRACE_ENGINE_ARGS"} & told.keys()
    assert ("Deployment", "prefill") not in render("minimal", "--set", "workers.prefill=null")


def test_autoscalers_own_the_number_of_pods():
    resources = render("autoscaling")
    assert not any("replicas" in resources["Deployment", name]["spec"] for name in ("gateway", "prefill", "decode"))
    keda = resources["ScaledObject", "prefill"]["spec"]
    assert keda["scaleTargetRef"] == {"name": "fleet-headrace-prefill"}
    assert keda["maxReplicaCount"] == 16
    query = keda["triggers"][0]["metadata"]["query"]
    assert query == (
        'sum(headrace_worker_prefill_tokens_waiting{job="headrace-worker",namespace="serving",fleet="fleet",worker_set="prefill"})'
    )
    relabelled = render("secured")["PodMonitor", "worker"]["spec"]["podMetricsEndpoints"][0]["relabelings"]
    assert {rule["targetLabel"] for rule in relabelled} == {"job", "fleet", "worker_set"}
    hpa = resources["HorizontalPodAutoscaler", "decode"]["spec"]
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == "vllm:num_requests_running"


def test_the_rules_are_the_tested_ones():
    rule = render("secured")["PrometheusRule", "fleet-headrace"]
    assert rule["spec"] == yaml.safe_load((CHART.parents[1] / "observability" / "alerts.yml").read_text())
