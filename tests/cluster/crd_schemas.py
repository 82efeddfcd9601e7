"""Turn the openAPIV3Schema of a Kubernetes CRD into a strict JSON schema, in which a misspelt key is an error."""

from typing import Any

QUANTITY = r"^[+-]?[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with each object limited to its listed keys, except maps and objects that keep unknown keys."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "default"}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        return made | {"type": ["integer", "string"]}
    if "properties" in schema:
        made["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        defaulted = {name for name, inner in schema["properties"].items() if "default" in inner}
        made["required"] = [name for name in schema.get("required", []) if name not in defaulted]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def of_crd(crd: dict[str, Any], version: str) -> dict[str, Any]:
    """Return the strict schema of one version of a CRD. Any metadata is allowed, as Kubernetes itself checks it."""
    [schema] = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == version]
    made = strict(schema)
    made["properties"]["metadata"] = {"type": "object"}
    return made
