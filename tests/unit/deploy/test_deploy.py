"""Container files, compose, Kubernetes and Prometheus against the commands they start.

No container engine runs here: what is proven is that every flag, variable, port, file and name in
`deploy/` and its documents is one that the code has, and that the parts fit each other.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml  # comes with huggingface-hub and gguf
from prometheus_client import CollectorRegistry

from coordinator.cli import START_GROUPS
from coordinator.process import _STOP_S
from engine.base.option_groups import WORKER_GROUPS, DraftOptions
from engine.base.options import add_flags, parser, resolve
from engine.checkpoint.packaged import DEFAULT_MODEL, PACKAGED
from engine.http.guard import refusals_counter
from engine.rpc.auth import ClusterToken, stays_on_this_machine
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.metrics import RpcMetrics, WorkerMetrics
from tests.support.paths import ROOT
from worker.run import ENGINE

DEPLOY = ROOT / "deploy"
GROUPS = {
    "coordinator": START_GROUPS,
    "prefill": WORKER_GROUPS,
    "decode": (*WORKER_GROUPS, DraftOptions),
}
# Read by engine.base.options beside the options' own variables.
OTHER_VARIABLES = {"DIPTYCH_CACHE_DIR", "DIPTYCH_STATE_DIR", "DIPTYCH_CONFIG"}
COORDINATOR, WORKER = DEPLOY / "Containerfile.coordinator", DEPLOY / "Containerfile.worker"


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def fields(command):
    return {f.name for group in GROUPS[command] for f in dataclasses.fields(group)}


def started(argv, environ):
    """The options that a container's command line and environment give; any unknown one fails."""
    command, verb, *flags = argv
    assert verb == "start"
    for name in environ:
        if name.startswith("DIPTYCH_"):
            known = name.removeprefix("DIPTYCH_").lower() in fields(command)
            assert known or name in OTHER_VARIABLES, f"{command}: {name}"
    arguments = parser(command, "")
    add_flags(arguments, *GROUPS[command])
    out = resolve(arguments.parse_args(flags), *GROUPS[command], environ=environ)
    return {key: item for group in out for key, item in dataclasses.asdict(group).items()}


def port(address):
    return int(address.rpartition(":")[2])


def seconds(text):
    return int(str(text).removesuffix("s"))


# --- Container files


def instructions(path):
    """(word, rest) of each instruction, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def rest(path, word):
    return [r for w, r in instructions(path) if w == word]


def json_form(text):
    return yaml.safe_load(text[text.index("[") :])


def image_environment(path):
    pairs = (item.split("=", 1) for line in rest(path, "ENV") for item in shlex.split(line))
    return dict(pairs)


def build_arguments(path):
    return dict(line.split("=", 1) for line in rest(path, "ARG"))


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("path", [COORDINATOR, WORKER], ids=lambda p: p.name)
def test_what_an_image_copies_is_there_and_enough(path):
    sources = [s for line in rest(path, "COPY") for s in shlex.split(line)[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
    ignore = path.with_name(path.name + ".dockerignore").read_text().split()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    packages = pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {p.rstrip("*") for p in packages} | {"pyproject.toml"} <= set(sources)
    assert pyproject()["project"]["readme"] in sources


@pytest.mark.parametrize("path", [COORDINATOR, WORKER], ids=lambda p: p.name)
def test_what_an_image_installs_exists(path):
    extras = pyproject()["project"]["optional-dependencies"]
    wanted = build_arguments(path).get("EXTRAS", "").split(",")
    assert all(extra in extras for extra in wanted if extra)
    assert build_arguments(path)["DEFAULT_MODEL"] in PACKAGED[DEFAULT_MODEL].install
    environ = image_environment(path)
    assert {n for n in environ if n.startswith("DIPTYCH_")} <= OTHER_VARIABLES
    assert rest(path, "VOLUME") == [environ["DIPTYCH_CACHE_DIR"]]
    assert rest(path, "USER") == ["10001:10001"]


def test_the_coordinators_image_has_no_torch():
    installs = [line for line in rest(COORDINATOR, "RUN") if "pip install" in line]
    assert installs and not any("[" in line.replace("[ -n", "") for line in installs)
    needed = " ".join(pyproject()["project"]["dependencies"])
    assert not re.search(r"torch|nixl|flashinfer", needed)
    base = build_arguments(COORDINATOR)["BASE"]
    assert base.startswith("python:3.11") and base.endswith("slim")


def test_the_coordinators_image_is_probed_where_it_listens():
    (command,) = rest(COORDINATOR, "CMD")
    options = started(json_form(command), {})
    assert options["workers"] == "external"
    ports = [port(options["listen"]), port(options["http"])]
    assert [int(p) for p in rest(COORDINATOR, "EXPOSE")[0].split()] == ports
    (health,) = rest(COORDINATOR, "HEALTHCHECK")
    assert f"http://127.0.0.1:{ports[1]}/health'" in health


def test_the_workers_image_serves_both_commands():
    (command,) = rest(WORKER, "CMD")
    assert json_form(command)[0] in pyproject()["project"]["scripts"]
    _, http = rest(WORKER, "EXPOSE")[0].split()
    assert f"http://127.0.0.1:{http}/health/ready'" in rest(WORKER, "HEALTHCHECK")[0]


def test_the_workers_image_can_compile_flashinfers_kernels():
    """With nvcc, whose CUDA is that of torch 2.13's build, its host compiler, and c++ to link."""
    assert re.match(r"nvidia/cuda:13\.\S+-devel-", build_arguments(WORKER)["BASE"])
    (install,) = (line for line in rest(WORKER, "RUN") if "apt-get install" in line)
    assert {"gcc", "g++", "libc6-dev"} <= set(install.split())
    environ = image_environment(WORKER)
    assert environ["FLASHINFER_WORKSPACE_BASE"] == environ["DIPTYCH_CACHE_DIR"]
    assert environ["PATH"].startswith("/opt/venv/bin:"), "where pip puts ninja"
    assert re.fullmatch(
        r"flashinfer-python==[\d.]+", *pyproject()["project"]["optional-dependencies"]["gpu"]
    )


# --- compose


def interpolate(text):
    """${NAME:-default} -> default, as where NAME is unset."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(text))


def compose_environment(service):
    return {k: interpolate(v) for k, v in service.get("environment", {}).items()}


def served():
    services = load("compose.yaml")["services"]
    return {name: services[name] for name in GROUPS}


def compose_options(name):
    service = served()[name]
    (command,) = rest(COORDINATOR, "CMD")
    argv = service.get("command") or json_form(command)
    assert argv[0] == name
    return started(argv, compose_environment(service))


@pytest.mark.parametrize("name", GROUPS)
def test_compose_probes_and_publishes_what_listens(name):
    service, options = served()[name], compose_options(name)
    ports = {port(options["listen"]), port(options["http"])}
    assert f"http://127.0.0.1:{port(options['http'])}/" in service["healthcheck"]["test"][-1]
    for published in service["ports"]:
        assert published.startswith("127.0.0.1:"), "clients are not authenticated"
        assert port(published) in ports
    environ = image_environment(WORKER)
    cache, state = (environ[f"DIPTYCH_{name}_DIR"] for name in ("CACHE", "STATE"))
    assert service["volumes"] == [f"cache:{cache}", f"state:{state}"]
    assert (ROOT / service["build"]["dockerfile"]).exists()
    assert options["listen"].startswith("0.0.0.0:")


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_compose_workers_find_each_other(name):
    services, options = load("compose.yaml")["services"], compose_options(name)
    where = compose_options("coordinator")["listen"].replace("0.0.0.0", "coordinator")
    assert options["coordinator"] == where
    assert options["advertise"] == name, "the name that compose gives it on the network"
    # What UCX's CMA lane wants: one owner of the IPC and PID namespaces, which is no worker, and
    # one user.
    assert services[name]["pid"] == services[name]["ipc"] == "service:namespaces"
    assert services["namespaces"]["ipc"] == "shareable"
    assert not any("user" in service for service in services.values())
    asked = services[name]["build"]["args"]
    assert set(asked) <= set(build_arguments(WORKER))
    assert set(asked["EXTRAS"].split(",")) <= set(pyproject()["project"]["optional-dependencies"])


def test_compose_makes_one_token_for_all(tmp_path):
    """The container that makes it, run here: others start when it is there, and can use it."""
    maker = load("compose.yaml")["services"]["namespaces"]
    asked = {compose_options(name)["cluster_token_file"] for name in GROUPS}
    (path,) = asked
    state = image_environment(COORDINATOR)["DIPTYCH_STATE_DIR"]
    assert path.startswith(f"{state}/") and maker["volumes"] == [f"state:{state}"]
    assert f" {state} " in f" {' '.join(rest(COORDINATOR, 'RUN'))} ", "made in the image"
    assert maker["healthcheck"]["test"] == ["CMD", "test", "-s", path]
    for service in served().values():
        assert service["depends_on"] == {"namespaces": {"condition": "service_healthy"}}
    (script,) = maker["command"]
    script = (
        script.replace("$$", "$").replace(state, str(tmp_path)).replace("exec sleep infinity", "")
    )
    made = []
    for _ in range(2):  # a restart keeps what is there
        environ = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        subprocess.run([*maker["entrypoint"], script], check=True, timeout=20, env=environ)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        made.append(ClusterToken.load(str(file)).metadata)
    assert made[0] == made[1]


def test_compose_gives_time_to_drain():
    for name, service in served().items():
        least_s = compose_options(name)["drain_s"] + _STOP_S
        assert seconds(service["stop_grace_period"]) > least_s


def test_compose_gpu_overlay():
    overlay = load("compose.gpu.yaml")["services"]
    assert set(overlay) == {"prefill", "decode"}
    for name, service in overlay.items():
        both = compose_environment(served()[name]) | compose_environment(service)
        assert started(served()[name]["command"], both)["device"] == "cuda"
        asked = build_arguments(WORKER)
        assert service["build"]["args"] == {key: asked[key] for key in ("BASE", "EXTRAS")}
        # Both see all GPUs: UCX's cuda_ipc needs it. Each computes on its own.
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
    own = [service["environment"]["CUDA_VISIBLE_DEVICES"] for service in overlay.values()]
    assert [interpolate(gpu) for gpu in own] == ["0", "1"]


# --- Kubernetes


def manifest():
    return (DEPLOY / "kubernetes" / "diptych.yaml").read_text()


def objects(kind):
    documents = yaml.safe_load_all(manifest())
    found = [d for d in documents if d["kind"] == kind]
    return {d["metadata"]["name"]: d for d in found}


def workloads():
    """command -> (workload, pod spec, container)"""
    out = {}
    for workload in [*objects("Deployment").values(), *objects("StatefulSet").values()]:
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        out[container["args"][0]] = (workload, pod, container)
    return out


def pod_options(command):
    container = workloads()[command][2]
    environ = {}
    for source in container.get("envFrom", []):
        environ |= objects("ConfigMap")[source["configMapRef"]["name"]]["data"]
    fields_of_pod = {"status.podIP": "10.1.2.3", "metadata.name": f"{command}-0"}
    for item in container["env"]:
        where = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        environ[item["name"]] = fields_of_pod[where] if where else item["value"]
    return started(container["args"], environ)


def test_kubernetes_runs_all_three():
    assert set(workloads()) == set(GROUPS)
    assert workloads()["coordinator"][0]["spec"]["replicas"] == 2


@pytest.mark.parametrize("command", GROUPS)
def test_kubernetes_pods(command):
    workload, pod, container = workloads()[command]
    options = pod_options(command)
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"grpc": port(options["listen"]), "http": port(options["http"])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        hangs = probe == "livenessProbe" and command != "coordinator"
        service = {"service": ENGINE} if hangs else {}
        assert container[probe]["grpc"] == {"port": ports["grpc"], **service}
    wanted, labels = workload["spec"]["selector"], workload["spec"]["template"]["metadata"]
    assert wanted["matchLabels"] == labels["labels"] == workload["metadata"]["labels"]
    image = COORDINATOR if command == "coordinator" else WORKER
    user = int(rest(image, "USER")[0].split(":")[0])
    security = pod["securityContext"]
    assert security["runAsUser"] == security["fsGroup"] == user
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = [v["name"] for v in pod.get("volumes", [])]
    volumes += [v["metadata"]["name"] for v in workload["spec"].get("volumeClaimTemplates", [])]
    trust = mounts.pop("trust")
    assert mounts == {"cache": image_environment(image)["DIPTYCH_CACHE_DIR"]}
    assert sorted(volumes) == ["cache", "trust"]
    secret = next(v["secret"] for v in pod["volumes"] if v["name"] == "trust")
    key = options["cluster_token_file"].removeprefix(f"{trust}/")
    made = re.search(r"create secret generic (\S+) --from-literal=(\w+)=", manifest())
    assert (secret["secretName"], key) == made.groups()
    assert secret["defaultMode"] == 0o440, "the pod's group alone reads it"


def test_kubernetes_coordinator_has_time_to_drain():
    _, pod, container = workloads()["coordinator"]
    sleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    least_s = sleep_s + pod_options("coordinator")["drain_s"] + _STOP_S
    assert pod["terminationGracePeriodSeconds"] > least_s


@pytest.mark.parametrize("command", ["prefill", "decode"])
def test_kubernetes_workers(command):
    workload, pod, container = workloads()[command]
    options, services = pod_options(command), objects("Service")
    assert pod["terminationGracePeriodSeconds"] > options["drain_s"] + _STOP_S
    name, _, where = options["coordinator"].partition(":")
    dialled = services[name]["spec"]
    assert dialled["clusterIP"] == "None", "each coordinator has to be found, not one of them"
    assert dialled["publishNotReadyAddresses"] is True
    assert dialled["selector"]["app.kubernetes.io/component"] == "coordinator"
    assert int(where) == port(pod_options("coordinator")["listen"])
    assert (options["advertise"], options["worker_id"]) == ("10.1.2.3", f"{command}-0")
    assert services[workload["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_services_select_pods_that_listen():
    pods = [
        (workload["spec"]["template"]["metadata"]["labels"], container)
        for workload, _, container in workloads().values()
    ]
    for service in objects("Service").values():
        selected = [
            c for labels, c in pods if service["spec"]["selector"].items() <= labels.items()
        ]
        assert len(selected) == 1, service["metadata"]["name"]
        listening = {p["name"]: p["containerPort"] for p in selected[0]["ports"]}
        for offered in service["spec"]["ports"]:
            assert listening[offered["targetPort"]] == offered["port"]


def test_kubernetes_everything_is_in_the_namespace():
    (namespace,) = objects("Namespace")
    documents = yaml.safe_load_all(manifest())
    others = [d for d in documents if d["kind"] != "Namespace"]
    assert {d["metadata"]["namespace"] for d in others} == {namespace}


def test_kubernetes_network_policy_leaves_metrics_open():
    (policy,) = objects("NetworkPolicy").values()
    inside, metrics = policy["spec"]["ingress"]
    assert "ports" not in inside, "UCX connects to ports of the kernel's choice"
    assert [p["port"] for p in metrics["ports"]] == [port(pod_options("decode")["http"])]
    (roles,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert set(roles["values"]) == {"prefill", "decode"}


@pytest.mark.parametrize("command", GROUPS)
def test_who_listens_for_other_machines_has_a_token(command):
    """Or the command would refuse to start."""
    for options in (pod_options(command), compose_options(command)):
        assert options["cluster_token_file"] or stays_on_this_machine(options["listen"])


# --- Prometheus


def test_prometheus_on_one_machine_scrapes_what_compose_publishes():
    (job,) = load("prometheus/one-machine.yaml")["scrape_configs"]
    targets = {s["labels"]["component"]: s["targets"] for s in job["static_configs"]}
    for name, service in served().items():
        http = port(compose_options(name)["http"])
        published = [p.rpartition(":")[0] for p in service["ports"] if port(p) == http]
        assert targets.pop(name) == published
    assert not targets


def test_prometheus_in_the_cluster_selects_the_pods():
    (job,) = load("prometheus/kubernetes.yaml")["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery["namespaces"]["names"] == list(objects("Namespace"))
    label, _, value = discovery["selectors"][0]["label"].partition("=")
    keep = next(r for r in job["relabel_configs"] if r.get("action") == "keep")
    for workload, _, container in workloads().values():
        assert workload["spec"]["template"]["metadata"]["labels"][label] == value
        assert keep["regex"] in [p["name"] for p in container["ports"]]
    assert not {r.get("target_label") for r in job["relabel_configs"]} & metric_labels()


def test_prometheus_by_dns_asks_for_headless_services():
    jobs = load("prometheus/dns.yaml")["scrape_configs"]
    components = set()
    for job in jobs:
        (discovery,) = job["dns_sd_configs"]
        (name,) = discovery["names"]
        service, namespace, *tail = name.split(".")
        spec = objects("Service")[service]["spec"]
        assert (namespace, tail) == (*objects("Namespace"), ["svc", "cluster", "local"])
        assert spec["clusterIP"] == "None"
        assert discovery["port"] == next(p["port"] for p in spec["ports"] if p["name"] == "http")
        (relabel,) = job["relabel_configs"]
        assert relabel["replacement"] == spec["selector"]["app.kubernetes.io/component"]
        components.add(relabel["replacement"])
    assert components == set(GROUPS)


# --- documents


def families():
    """Every metric family that a process can have."""
    worker, front = CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(worker, "m")
    CoordinatorMetrics(front, "m")
    RpcMetrics(front)
    refusals_counter(front)
    return [family for registry in (worker, front) for family in registry.collect()]


def metric_labels():
    worker, front = CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(worker, "m").kv_transfer_failed("peer_lost")
    metrics = CoordinatorMetrics(front, "m")
    metrics.set_workers("decode", "ready", 1)
    RpcMetrics(front).failed("S/M", "internal")
    samples = [s for r in (worker, front) for family in r.collect() for s in family.samples]
    return {label for sample in samples for label in sample.labels}


@pytest.mark.parametrize("name", ["deploy.md", "operations.md", "security.md"])
def test_documents_name_what_exists(name):
    text = (ROOT / "docs" / name).read_text()
    known = set().union(*map(fields, GROUPS))
    ours = re.findall(r"(?<![\w-])--([a-z][a-z-]+)", " ".join(re.findall(r"`[^`]+`", text)))
    tools = {"config", "server", "scale", "holds"}  # not options of `start`
    for flag in ours:
        assert flag in tools or flag.replace("-", "_") in known, flag
    for variable in set(re.findall(r"DIPTYCH_[A-Z_]*[A-Z]", text)):
        assert variable in OTHER_VARIABLES or variable[8:].lower() in known, variable
    for path in re.findall(r"`((?:deploy|docs|tests|engine|coordinator)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    series = {f.name + ("_total" if f.type == "counter" else "") for f in families()}
    for metric in re.findall(r"`(diptych_\w+)", text):
        assert metric in series, metric
