"""What a pod may do and whom it may reach. No cluster is needed: its rules are applied to the manifests."""

import json
import re
import shutil
import subprocess
from itertools import product
from typing import Any

import pytest
import yaml

from tests.infra.cluster import BY_HAND, CLUSTER, FOLDER, Pod, containers, documents, pods, reaches, templates

TEMPLATES = templates()
CONTAINERS = {f"{name}/{item['name']}": item for name, template in TEMPLATES.items() for item in containers(template)}
POLICIES = [item for item in documents() if item["kind"] == "NetworkPolicy"]
STAGES = ("worker", "gpu-run", "gpu-nodes")
# Who may connect to whom, on which ports. Everything else is refused.
WANTED = {
    **{(stage, server): ports for stage, (server, ports) in product(STAGES, [
        ("prefect", {4200}), ("mlflow", {5000}), ("s3", {8333})])},
    ("prefect", "postgres"): {5432}, ("mlflow", "postgres"): {5432}, ("mlflow", "s3"): {8333},
    ("gpu-nodes", "gpu-nodes"): {29400, 32768, 45000, 60999},
    **{(pod, "dns"): {53} for pod in ("prefect", "mlflow", *STAGES)},
}
# Of the object store: S3, S3's gRPC; the master's, the volume server's and the filer's two; Iceberg's and Lance's.
S3_INNER = (18333, 9333, 19333, 8080, 18080, 8888, 18888, 8181, 9101)
PORTS = (22, 53, 80, 443, 2379, 4200, 5000, 5432, 6443, 8333, 10250, 29400, 29401, 32767, 32768, 45000, 60999, 61000,
         *S3_INNER)
SERVERS = [name for name in CONTAINERS if name.split("/")[0] in ("postgres", "s3", "prefect", "mlflow")
           and name != "mlflow/bucket"]
RIGHTS = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile",
          "allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}  # what a security context may say
SHARED = {"hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace", "serviceAccountName"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_no_rights(name: str) -> None:
    """Field by field what Kubernetes' profile `restricted` asks for, and a read-only root file system."""
    pod = TEMPLATES[name.split("/")[0]]["spec"]
    own = CONTAINERS[name].get("securityContext", {})
    both = {**pod.get("securityContext", {}), **own}
    assert both.get("runAsNonRoot") is True
    assert both.get("runAsUser", 0) > 0
    assert both.get("seccompProfile") == {"type": "RuntimeDefault"}
    assert own.get("allowPrivilegeEscalation") is False
    assert own.get("capabilities") == {"drop": ["ALL"]}
    assert own.get("readOnlyRootFilesystem") is True
    assert not own.get("privileged")
    assert "hostPort" not in json.dumps(CONTAINERS[name].get("ports", []))
    assert both.keys() <= RIGHTS


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_shares_nothing_with_its_machine(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    assert not SHARED & spec.keys()
    assert spec.get("automountServiceAccountToken") is False
    assert spec.get("enableServiceLinks") is False
    for volume in spec.get("volumes", []):
        assert volume.keys() - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}, volume["name"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_says_what_it_needs_and_gets_no_more(name: str) -> None:
    resources = CONTAINERS[name].get("resources", {})
    for side in ("requests", "limits"):
        assert resources.get(side, {}).keys() >= {"cpu", "memory", "ephemeral-storage"}, side


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_a_container_writes_is_a_volume(name: str) -> None:
    """tests/infra/test_sandbox.py runs the servers with these folders and no others."""
    template = TEMPLATES[name.split("/")[0]]["spec"]
    mounted = {item["mountPath"] for item in CONTAINERS[name].get("volumeMounts", [])}
    wanted = {"/tmp", "/var/run/postgresql"} if name == "postgres/postgres" else {"/tmp", "/home/instructflow"}
    assert mounted >= wanted
    claims = {item["name"] for item in template.get("volumes", [])}
    owner = next(item for item in documents()
                 if item["metadata"]["name"] == name.split("/")[0] and "template" in item.get("spec", {}))
    claims |= {item["metadata"]["name"] for item in owner["spec"].get("volumeClaimTemplates", [])}
    assert {item["name"] for item in CONTAINERS[name]["volumeMounts"]} <= claims


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_hangs_is_noticed(name: str) -> None:
    assert CONTAINERS[name].keys() >= {"startupProbe", "livenessProbe", "readinessProbe"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_image_has_a_version(name: str) -> None:
    image = CONTAINERS[name]["image"]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?", image), image
    assert ":latest" not in image
    if "@" not in image:
        assert CONTAINERS[name].get("imagePullPolicy") == "Always"


def test_the_namespace_refuses_pods_with_more_rights() -> None:
    (namespace,) = (item for item in documents() if item["kind"] == "Namespace")
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") == "restricted"


def test_everything_is_in_the_namespace() -> None:
    for name in (path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml"):
        for item in yaml.safe_load_all((FOLDER / name).read_text()):
            assert item["kind"] == "Namespace" or item["metadata"].get("namespace") == "instructflow", name


def test_no_secret_is_in_a_manifest() -> None:
    for path in FOLDER.parent.rglob("kubernetes*/*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            assert item["kind"] != "Secret", path.name
            assert "secretGenerator" not in item, path.name
    for name, container in CONTAINERS.items():
        for variable in container.get("env", []):
            literal = variable.get("value", "")
            assert not re.search("PASSWORD|SECRET|AUTH|TOKEN|(^|_)KEY", variable["name"]) or not literal, name
            assert not re.search(r"://[^/]*:(?!\$\()[^/]*@", literal), f"{name}: a password in {variable['name']}"
        said = " ".join([*container.get("command", []), *container.get("args", [])])
        assert not re.search(r"\$\(\w*(PASSWORD|SECRET|AUTH)\w*\)", said), f"{name}: a secret in the command line"


def test_the_whole_matrix_of_connections() -> None:
    """Each pod to each pod on each port that anything listens on, and on some that nothing does."""
    everyone = pods()
    found = {}
    for source, target in product(everyone, everyone):
        if source in CLUSTER and source != "debris" and target in CLUSTER and target != "debris":
            continue  # other people's pods among themselves
        protocol = "UDP" if target == "dns" else "TCP"
        ports = {port for port in PORTS if reaches(POLICIES, everyone[source], everyone[target], port, protocol)}
        if ports:
            found[source, target] = ports
    assert found == WANTED


def test_only_https_to_public_addresses_leaves_the_cluster() -> None:
    public, private = ("93.184.216.34", "2606:2800:220:1::1"), (
        "10.0.0.1", "10.96.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.100.100.200", "127.0.0.1",
        "fd00:ec2::254", "fe80::1", "::1")
    for name, pod in pods().items():
        if pod.namespace != "instructflow":
            continue
        leaves = name in ("prefect", *STAGES)
        for address in public:
            found = {port for port in PORTS if reaches(POLICIES, pod, address, port)}
            assert found == ({443} if leaves else set()), name
        for address in private:
            assert not any(reaches(POLICIES, pod, address, port) for port in PORTS), f"{name} reaches {address}"


def test_without_the_internet_file_nothing_leaves() -> None:
    inside = [item for item in POLICIES if item["metadata"]["name"] != "internet"]
    assert len(inside) == len(POLICIES) - 1
    assert not any(reaches(inside, pod, "93.184.216.34", 443) for pod in pods().values()
                   if pod.namespace == "instructflow")


def test_the_ingress_controller_reaches_the_two_servers_with_passwords_and_nothing_else() -> None:
    over = list(yaml.safe_load_all((FOLDER.parent / "kubernetes-tls" / "ingress.yaml").read_text()))
    (ingress,) = (item for item in over if item["kind"] == "Ingress")
    rules = [*POLICIES, *(item for item in over if item["kind"] == "NetworkPolicy")]
    controller = Pod("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"})
    found = {(name, port) for name, pod in pods().items() for port in PORTS if name not in ("dns", "stranger")
             and reaches(rules, controller, pod, port)}
    assert found == {(name, port) for name in ("prefect", "mlflow") for port in (4200, 5000)}
    assert {rule["host"] for rule in ingress["spec"]["rules"]} == set(ingress["spec"]["tls"][0]["hosts"])
    targets = [path["backend"]["service"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert {(item["name"], item["port"]["number"]) for item in targets} == {("prefect", 4200), ("mlflow", 5000)}
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/ssl-redirect"] == "true"
    assert not any(reaches(POLICIES, controller, pod, port) for name, pod in pods().items() for port in PORTS
                   if name not in ("dns", "stranger"))


def test_a_service_s_port_is_its_container_s() -> None:
    for item in documents():
        if item["kind"] != "Service":
            continue
        (target,) = (template["spec"] for template in TEMPLATES.values()
                     if template["metadata"]["labels"] == item["spec"]["selector"])
        listening = {port["containerPort"] for container in target["containers"] for port in container.get("ports", [])}
        assert {port["port"] for port in item["spec"]["ports"]} <= (listening or {29400})


@pytest.mark.parametrize(("policy", "expected"), [
    ({"podSelector": {}, "policyTypes": ["Ingress"]}, False),
    ({"podSelector": {}, "policyTypes": ["Egress"]}, True),
    ({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]}, True),
    ({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}, False),
    ({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"namespaceSelector": {}}]}]}, True),
    ({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 80, "endPort": 90}]}]}, True),
    ({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 86}]}]}, False),
    ({"podSelector": {"matchLabels": {"app": "b"}}, "policyTypes": ["Ingress"]}, True),
])
def test_policies_are_read_as_kubernetes_reads_them(policy: dict[str, Any], expected: bool) -> None:
    """Cases of Kubernetes' documentation: another namespace's pod connects to pod a on port 85."""
    rules = [{"metadata": {"namespace": "here"}, "spec": policy}]
    assert reaches(rules, Pod("there", {"app": "c"}), Pod("here", {"app": "a"}), 85) is expected


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, which has kustomize in it")
@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes-tls"])
def test_kustomize_makes_the_same_pods(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER.parent / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [item for item in yaml.safe_load_all(done.stdout) if "template" in item.get("spec", {})]
    by_hand = {item["metadata"]["name"] for name in BY_HAND for item in yaml.safe_load_all((FOLDER / name).read_text())}
    listed = {name: template for name, template in TEMPLATES.items() if name not in by_hand}
    assert {item["metadata"]["name"] for item in made} == listed.keys()
    for item in made:
        assert item["metadata"]["namespace"] == "instructflow"
        pairs = zip(containers(listed[item["metadata"]["name"]]), containers(item["spec"]["template"]), strict=True)
        for ours, theirs in pairs:
            assert theirs["securityContext"] == ours["securityContext"]
            assert not theirs["image"].startswith("instructflow"), "the image that kustomization.yaml names"
