"""The templates of the Helm chart: the manifests of install.yaml, in which what differs between installations became a value.

    install_manifests() --replace--> the same objects, some strings now Helm's {{ ... }} --dump, unquote--> templates/*.yaml

One source for both ways to install, so neither can lack a right or a rule that the other has. The CRD is a template and not in Helm's
crds/, because Helm never upgrades what stands there, and an operator whose CRD lacks a field ends at its start. It is kept when the
release goes: with the CRD every OnlineTrainingJob would go, and with these their Jobs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from otj_operator.crd.install import NAMESPACE, install_manifests

Manifest = dict[str, Any]

FOLDER = "charts/online-training-operator"
KEEP = {"helm.sh/resource-policy": "keep"}

_RELEASE_NAMESPACE = "{{ $.Release.Namespace }}"
_POD_FIELDS = """\
      {{- range $field := list "imagePullSecrets" "nodeSelector" "tolerations" "affinity" "priorityClassName" }}
      {{- with index $.Values $field }}
      {{ $field }}: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
"""
"""Fields of the operator's pod that an admin may set."""


def chart_templates(dump: Callable[[list[Manifest]], str]) -> dict[str, str]:
    """The text of each generated template by its path in the repository; `dump` writes objects as YAML."""

    def text(*manifests: Manifest) -> str:
        return _unquoted(dump(list(manifests)))

    in_each, everywhere = text(_binding_of_the_operator(("{{ . }}",))), text(_binding_of_the_operator(()))
    templates = {
        "crd": f"{{{{- if .Values.crds.install }}}}\n{text(_kept_crd())}{{{{- end }}}}\n",
        "admission-policy": text(*_of_kind("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")),
        "roles": text(*_of_kind("ServiceAccount", "ClusterRole", "Role")),
        "bindings": f"{text(*_other_bindings())}{{{{- range .Values.namespaces }}}}\n---\n{in_each}"
        f"{{{{- else }}}}\n---\n{everywhere}{{{{- end }}}}\n",
        "network-policy": f"{{{{- if .Values.networkPolicy.enabled }}}}\n{text(*_of_kind('NetworkPolicy'))}{{{{- end }}}}\n",
        "deployment": text(_deployment()).replace("      containers:\n", f"{_POD_FIELDS}      containers:\n"),
    }
    return {f"{FOLDER}/templates/{name}.yaml": body for name, body in templates.items()}


def _placed(value: Any) -> Any:
    """`value` with the release's namespace wherever the manifests name the operator's own."""
    if isinstance(value, dict):
        return {key: _placed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_placed(part) for part in value]
    return _RELEASE_NAMESPACE if value == NAMESPACE else value


def _kept_crd() -> Manifest:
    (crd,) = _of_kind("CustomResourceDefinition")
    return crd | {"metadata": crd["metadata"] | {"annotations": KEEP}}


def _of_kind(*kinds: str, namespaces: tuple[str, ...] = ()) -> list[Manifest]:
    return [_placed(manifest) for manifest in install_manifests(namespaces) if manifest["kind"] in kinds]


def _bindings(namespaces: tuple[str, ...]) -> list[Manifest]:
    return _of_kind("ClusterRoleBinding", "RoleBinding", namespaces=namespaces)


def _other_bindings() -> list[Manifest]:
    """The bindings that do not depend on which namespaces are served."""
    return [binding for binding in _bindings(()) if binding in _bindings(("x",))]


def _binding_of_the_operator(namespaces: tuple[str, ...]) -> Manifest:
    (binding,) = (binding for binding in _bindings(namespaces) if binding not in _other_bindings())
    return binding


def _deployment() -> Manifest:
    (deployment,) = _of_kind("Deployment")
    deployment["spec"]["replicas"] = "{{ .Values.replicas }}"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (runtime,) = (variable for variable in container["env"] if variable["name"] == "OTJ_RUNTIME_IMAGE")
    runtime["value"] = "{{ .Values.runtimeImage | quote }}"
    given = {"--log-format": "{{ .Values.log.format }}", "--lease-seconds": "{{ .Values.leaseSeconds }}"}
    arguments = [f"{name}={given.get(name, value)}" for name, value in (word.split("=", 1) for word in container["args"])]
    container |= {
        "image": "{{ .Values.image | quote }}",
        "imagePullPolicy": "{{ .Values.imagePullPolicy }}",
        "resources": "{{- toYaml .Values.resources }}",
        "args": [
            *arguments,
            *("{{- if .Values.log.verbose }}", "--verbose", "{{- end }}"),
            *("{{- with .Values.namespaces }}", '--namespaces={{ join "," . }}', "{{- end }}"),
        ],
    }
    deployment["spec"]["template"]["spec"]["containers"] = [container]
    return deployment


def _unquoted(text: str) -> str:
    """YAML in which Helm's {{ ... }} stand as Helm wants them: alone on a line where they steer, indented where they bring a block."""
    text = re.sub(r"^( *)- '(\{\{- (?:if|with|end)\b[^']*)'$", r"\1\2", text, flags=re.MULTILINE)
    block = re.compile(r"^( *)(\w+): '\{\{- toYaml (\S+) \}\}'$", re.MULTILINE)
    text = block.sub(lambda m: f"{m[1]}{m[2]}: {{{{- toYaml {m[3]} | nindent {len(m[1]) + 2} }}}}", text)
    return re.sub(r"'(\{\{ [^']*\}\})'", r"\1", text)
