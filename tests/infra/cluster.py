"""The manifests as a cluster has them, and what its network policies let through."""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.flows.checkout import REPOSITORY

FOLDER = REPOSITORY / "infra" / "kubernetes"
BY_HAND = ("gpu-job.yaml", "gpu-nodes.yaml")  # `kubectl create -f`, when somebody wants a run
CLUSTER = {  # pods that every cluster has, and those of a stranger in it
    "dns": ("kube-system", {"k8s-app": "kube-dns"}), "stranger": ("elsewhere", {"app": "postgres"}),
    "debris": ("instructflow", {"app": "forgotten"})}


class Pod(NamedTuple):
    namespace: str
    labels: dict[str, str]


def documents(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All that kustomization.yaml lists, and the runs that are created by hand; every one in its namespace."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = [item for name in (*settings["resources"], *BY_HAND) if (folder / name).suffix == ".yaml"
             for item in yaml.safe_load_all((folder / name).read_text())]
    for item in found:
        if item["kind"] != "Namespace":
            item["metadata"].setdefault("namespace", settings["namespace"])
    return found


def templates(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Each pod template, by the name of what makes the pods."""
    return {item["metadata"]["name"]: item["spec"]["template"] for item in documents(folder)
            if "template" in item.get("spec", {})}


def containers(template: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def pods(folder: Path = FOLDER) -> dict[str, Pod]:
    found = {name: Pod("instructflow", template["metadata"]["labels"]) for name, template in templates(folder).items()}
    return {**found, **{name: Pod(*item) for name, item in CLUSTER.items()}}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "only In is understood here"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def names(peer: dict[str, Any], other: Pod | str, namespace: str) -> bool:
    """Whether a policy's peer means this pod, or this address outside of the cluster."""
    if isinstance(other, str):
        block, address = peer.get("ipBlock", {"cidr": "0.0.0.0/32"}), ipaddress.ip_address(other)
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(item) for item in block.get("except", []))
    if "ipBlock" in peer:
        return False
    inside = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}) \
        if "namespaceSelector" in peer else other.namespace == namespace
    return inside and selects(peer.get("podSelector", {}), other.labels)


def opens(rule: dict[str, Any], port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        item.get("protocol", "TCP") == protocol
        and ("port" not in item or item["port"] <= port <= item.get("endPort", item["port"]))
        for item in rule["ports"])


def allowed(policies: list[dict[str, Any]], direction: str, pod: Pod, other: Pod | str, port: int,
            protocol: str) -> bool:
    """Kubernetes' rule: a pod that no policy of this direction selects is open; otherwise one rule must allow it."""
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    applied = [item["spec"] for item in policies
               if item["metadata"]["namespace"] == pod.namespace and selects(item["spec"]["podSelector"], pod.labels)
               and direction in item["spec"]["policyTypes"]]
    return not applied or any(
        opens(rule, port, protocol)
        and (peers not in rule or any(names(peer, other, pod.namespace) for peer in rule[peers]))
        for spec in applied for rule in spec.get(key, []))


def reaches(policies: list[dict[str, Any]], source: Pod, target: Pod | str, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod may connect to a pod, or to an address outside: its own egress and the other's ingress."""
    return allowed(policies, "Egress", source, target, port, protocol) and (
        isinstance(target, str) or allowed(policies, "Ingress", target, source, port, protocol))
