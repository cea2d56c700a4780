"""Schemas of the Kubernetes objects in deploy/kubernetes, with exactly the fields used there.

They find a misspelt or misplaced field or one of the wrong kind, and wrong values that are listed
here. The fields were checked against KubeRay's whole CRDs (2026-08) when the manifests were
written. No cluster has run them.
"""

from typing import Any


def an_object(required: str = "", **properties: Any) -> dict[str, Any]:
    """Returns the schema of an object with exactly these properties; `required` must be there."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
METADATA = an_object("name namespace", name=TEXT, namespace=TEXT, labels=TEXTS)
RESOURCES = an_object("requests limits", requests=TEXTS, limits=TEXTS)
ENV = list_of(an_object("name", name=TEXT, value=TEXT, valueFrom={"type": "object"}))
MOUNTS = list_of(
    an_object(
        "name mountPath",
        name=TEXT,
        mountPath={"type": "string", "pattern": "^/"},
        subPath=TEXT,
        readOnly=FLAG,
    )
)
CONFINED = an_object(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities=TEXTS | {"additionalProperties": list_of(TEXT)},
)
PORTS = list_of(
    an_object(
        "containerPort name",
        containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
        name={"type": "string", "maxLength": 15},
    )
)
PROBE = an_object(
    "httpGet",
    httpGet=an_object("path port scheme", path=TEXT, port=TEXT, scheme={"enum": ["HTTP", "HTTPS"]}),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER = an_object(
    "name image resources securityContext",
    name=TEXT,
    image=TEXT,
    command=list_of(TEXT),
    ports=PORTS,
    env=ENV,
    resources=RESOURCES,
    readinessProbe=PROBE,
    securityContext=CONFINED,
    volumeMounts=MOUNTS,
)
VOLUME = an_object(
    "name",
    name=TEXT,
    secret=an_object("secretName", secretName=TEXT, defaultMode={"const": 0o440}),
    configMap=an_object("name", name=TEXT),
    emptyDir=an_object(medium={"const": "Memory"}, sizeLimit=TEXT),
)
PERSON = an_object(
    "runAsNonRoot",
    runAsNonRoot={"const": True},
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=TEXTS,
)
POD = an_object(
    "containers securityContext",
    nodeSelector=TEXTS,
    terminationGracePeriodSeconds=COUNT,
    securityContext=PERSON,
    initContainers=list_of(CONTAINER),
    containers=list_of(CONTAINER),
    volumes=list_of(VOLUME),
)
TEMPLATE = an_object("spec", metadata={"type": "object"}, spec=POD)
CLUSTER_SPEC = an_object(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=an_object("mode secretName", mode={"const": "token"}, secretName=TEXT),
    enableInTreeAutoscaling={"const": True},
    autoscalerOptions=an_object(
        "version",
        version={"const": "v2"},
        idleTimeoutSeconds=COUNT,
        resources=RESOURCES,
        securityContext=CONFINED,
        env=ENV,
        volumeMounts=MOUNTS,
    ),
    headGroupSpec=an_object("template rayStartParams", rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs=list_of(
        an_object(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        )
    ),
)
SPECS = {
    ("ray.io/v1", "RayCluster"): CLUSTER_SPEC,
    ("ray.io/v1", "RayService"): an_object(
        "serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=CLUSTER_SPEC
    ),
    ("v1", "Service"): an_object(
        "selector ports",
        type={"enum": ["ClusterIP", "LoadBalancer"]},
        selector=TEXTS,
        ports=list_of(an_object("port", name=TEXT, port=COUNT, targetPort=TEXT)),
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): an_object(
        "podSelector policyTypes ingress",
        podSelector={"type": "object"},
        policyTypes={"const": ["Ingress"]},
        ingress=list_of({"type": "object"}),
    ),
}


def schema_of(version: str, kind: str) -> dict[str, Any]:
    """Of a whole object. Raises KeyError for a kind that deploy/kubernetes has none of."""
    spec = SPECS[version, kind]
    return an_object(
        "apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec
    )
