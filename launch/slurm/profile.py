"""What a site's Slurm wants to be told: partition, GPUs, network, container, file systems."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo

from pretrain.errors import UserError
from pretrain.settings import NonNegative, Positive, Section
from pretrain.yaml_files import nearest_key, path_of, read_mapping, shipped_names

PROFILES = Path(__file__).parents[2] / "slurm" / "profiles"
# Profiles may extend one another; more than that is a circle.
EXTENDS_AT_MOST = 8
# Options of sbatch that a job would not be itself with, or that settings of their own stand for.
NOT_FOR_SITES = (
    *("account", "array", "begin", "chdir", "comment", "constraint", "cpus-per-task", "dependency"),
    *("error", "export", "gpus-per-node", "gpus-per-task", "input", "job-name"),
    *("kill-on-invalid-dep", "no-requeue", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "parsable", "partition", "qos", "requeue", "reservation", "signal"),
    *("test-only", "time", "wait", "wrap"),
)
# The context in which a profile is validated that no job has had yet. That of a job is taken as it
# is, or the job could not be submitted again once one more option is refused.
NEW = "new"
TIME_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?"
)


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be one line of text, not empty")
    return text


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, as in NCCL_IB_HCA")
    if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name):
        raise ValueError(
            "is a secret by its name, and logs and run directories are read by others: export it "
            "before you submit; jobs get the environment of the shell (--export=ALL)"
        )
    return name


def _long_option(option: str, info: ValidationInfo) -> str:
    match = re.match(r"--([a-z][a-z-]*)(=|$)", option)
    if not match:
        raise ValueError("must be a long option with its value, as in --switches=1")
    if info.context == NEW and match[1] in NOT_FOR_SITES:
        raise ValueError(f"--{match[1]} is set by farspan, from the other settings")
    # The nodes that a run avoids are added to those of the site.
    if info.context == NEW and match[1] == "exclude" and "/" in option:
        raise ValueError("sbatch would take it for a file: name the nodes, as in --exclude=n[1-3]")
    return option


def _time_limit(time: str) -> str:
    seconds_of(time)
    return time


def _scratch(path: str) -> str:
    unknown = set(re.findall(r"\{[^}]*\}?", path)) - {"{user}", "{job}"}
    if unknown or not path.startswith("/"):
        raise ValueError("must be an absolute path, in which {user} and {job} may stand")
    return path


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    return path


Line = Annotated[str, AfterValidator(_one_line)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Time = Annotated[Line, AfterValidator(_time_limit)]
AbsolutePath = Annotated[Line, AfterValidator(_absolute)]


class Setting(Section):
    """An environment variable of the ranks."""

    value: Annotated[str, Field(pattern=r"^[^\x00]*$")]
    why: Line


class Network(Section):
    interface: Line | None = Field(
        None, description="Of NCCL's and gloo's own connections, as in eth0 [what they find]."
    )
    hcas: Line | None = Field(
        None, description="The InfiniBand adapters of NCCL, as in mlx5_0,mlx5_1 [all]."
    )
    all_reduce_gb_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The bus bandwidth below which `farspan launch doctor` complains [none]."
    )


class Container(Section):
    runtime: Literal["none", "pyxis", "apptainer"] = Field(
        "none", description="pyxis: srun --container-image (enroot); apptainer: apptainer exec."
    )
    image: Line | None = Field(None, description="As the runtime names it.")
    mounts: tuple[Line, ...] = Field(
        (),
        description="Besides the run directory, its data, checkpoints and folders on the nodes' "
        "own disks: /path or /from:/to.",
    )
    python: Line = Field("python3", description="The Python of the image that has farspan.")


class Profile(Section):
    """A site. Null and auto are found out from Slurm when a job is submitted."""

    partition: Line | None = Field(None, description="[the default one]")
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    time: Time | None = Field(
        None, description="Limit of a job, which goes on as another one [the partition's]."
    )
    ranks_per_node: Positive | Literal["auto"] = Field("auto", description="auto: its GPUs, or 1.")
    cpus_per_rank: Positive | Literal["auto"] = Field("auto", description="auto: the node's share.")
    gpus: Literal["auto", "none", "gpus-per-node", "gpus-per-task", "gres"] = Field(
        "auto", description="How GPUs are asked for; auto: gpus-per-node where nodes have some."
    )
    gpu_type: Line | None = Field(None, description="As in h100, where Slurm tells them apart.")
    memory: Line | None = Field(None, description="Of a job on each node, as in 500G; 0: all.")
    exclusive: bool = Field(False, description="Whether no other job may share the nodes.")
    options: tuple[Annotated[Line, AfterValidator(_long_option)], ...] = Field(
        (), description="More options of sbatch."
    )
    stop_before_s: Positive = Field(
        300, description="How long before the time limit the ranks are asked to save and stop."
    )
    exclude_for_s: NonNegative = Field(
        6 * 3600, description="How long a node is avoided that has failed; 0: never."
    )
    network: Network = Network()
    container: Container = Container()
    modules: tuple[Line, ...] = Field((), description="Loaded before the ranks start.")
    scratch: Annotated[Line, AfterValidator(_scratch)] | None = Field(
        None, description="A folder on each node's own disk, for compiled kernels."
    )
    shared_paths: tuple[AbsolutePath, ...] = Field(
        (), description="All nodes see these, although their file system looks like a local one."
    )
    environment: dict[VariableName, Setting] = Field({}, description="More of the ranks.")


def profile_names() -> list[str]:
    """The shipped profiles."""
    return shipped_names(PROFILES)


def load_profile(name: str) -> Profile:
    """A shipped profile, or the YAML file of one, which may extend another: `extends: generic`.

    Raises:
        UserError: there is no such profile, or it has a key or value that is not allowed; the
            message names the nearest one.
    """
    return parse_profile(_read(name, ()), name)


def parse_profile(tree: Mapping[str, Any], name: str) -> Profile:
    """Check a new profile. `name` says in messages where it is from. Raises UserError."""
    try:
        return Profile.model_validate(tree, context=NEW)
    except ValidationError as error:
        raise UserError(_describe(error, name)) from None


def seconds_of(time: str) -> int:
    """Of a time limit as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds. Raises ValueError.
    """
    match = TIME_LIMIT.fullmatch(time.strip())
    if not match:
        raise ValueError("must be minutes, or H:MM:SS, or days-hours, as in 90, 24:00:00, 2-12")
    days, *parts = (match["days"], match["first"], match["second"], match["third"])
    numbers = [int(part) for part in parts if part]
    if days is not None:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:
        numbers = [0, *numbers, *[0] * (2 - len(numbers))]
    hours, minutes, seconds = numbers
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if not total:
        raise ValueError("must be more than no time at all")
    return total


def _read(name: str, extended_by: tuple[str, ...]) -> dict[str, Any]:
    """The mapping of a profile, over that of the one it extends."""
    path = path_of("profile", name, PROFILES)
    tree = read_mapping(path, "partition: gpu")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends = {base!r}: must be the name of a profile, or its file")
    if len(extended_by) == EXTENDS_AT_MOST:
        raise UserError(f"profiles extend each other in a circle: {', '.join(extended_by)}")
    # A file is named as seen from the one that names it.
    beside = path.parent / base
    return _over(_read(str(beside) if beside.is_file() else base, (*extended_by, name)), tree)


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _over(before, value)
        else:
            merged[key] = value
    return merged


def _describe(error: ValidationError, name: str) -> str:
    lines = []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"] if not _is_of_pydantic(part))
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"profile {name}: {dotted} is not a setting{nearest_key(dotted, _keys(Profile))}; "
                f"there are: {', '.join(Profile.model_fields)}"
            )
        else:
            wish = problem["msg"].removeprefix("Value error, ")
            wish = wish[0].lower() + wish[1:]
            lines.append(f"profile {name}: {dotted} = {problem['input']!r}: {wish}")
    return "\n".join(dict.fromkeys(lines))


def _is_of_pydantic(part: Any) -> bool:
    """Whether it was put into a location to say which member of a union, or a key, was tried."""
    return part == "[key]" or not re.fullmatch(r"[\w-]+", str(part)) or "constrained" in str(part)


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
