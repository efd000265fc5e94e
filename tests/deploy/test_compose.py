"""The container files hold together: what they start exists, waits for what it needs, and knows no secret.

PyYAML comes with ``moto[server]``. No engine is needed: this reads the files.
"""

from __future__ import annotations

import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

ROOT: Final = Path(__file__).resolve().parents[2]
DEFAULT: Final = "minioadmin"  # MinIO's documented credentials for local use

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
BUILT: Final = sorted(name for name, service in SERVICES.items() if "build" in service)


def instructions(dockerfile: Path) -> list[list[str]]:
    """Return the instructions of *dockerfile*, each as its words, continuation lines joined."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.strip()]


DOCKERFILE: Final = instructions(ROOT / "deploy" / "Dockerfile")


def copied_sources() -> list[str]:
    """Return what the Dockerfile copies from the repository."""
    return [
        source
        for word, *words in DOCKERFILE
        if word == "COPY" and not words[0].startswith("--from")
        for source in words[:-1]
    ]


def test_services_wait_for_what_they_need() -> None:
    """The bucket waits for a healthy server, packing for the bucket, training for the dataset."""
    conditions = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    assert conditions == {
        "minio": {},
        "bucket": {"minio": "service_healthy"},
        "pack": {"minio": "service_healthy", "bucket": "service_completed_successfully"},
        "train": {"minio": "service_healthy", "pack": "service_completed_successfully"},
    }


def test_a_service_that_must_be_healthy_says_how_to_tell() -> None:
    """Whatever is waited for with ``service_healthy`` has a health check that ends."""
    needed = {
        other
        for service in SERVICES.values()
        for other, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }
    assert needed == {"minio"}
    for name in needed:
        check = SERVICES[name]["healthcheck"]
        assert check["test"][0] in {"CMD", "CMD-SHELL"}
        assert check["retries"] > 0
        assert {"interval", "timeout"} <= set(check)


@pytest.mark.parametrize("name", BUILT)
def test_commands_run_files_that_are_in_the_image(name: str) -> None:
    """Each built service starts a script that exists here and that the Dockerfile copies."""
    service = SERVICES[name]
    assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    program, script, *_ = service["command"]
    assert program == "python"
    assert (ROOT / script).is_file()
    assert Path(script).parts[0] in copied_sources()


def test_the_bucket_is_the_one_that_is_used() -> None:
    """The one-shot service makes the bucket of ``DATA_URL``, at the endpoint the others use."""
    assert BUILT == ["pack", "train"]
    made = SERVICES["bucket"]["command"][-1].partition("/")[2]
    for name in BUILT:
        environment = SERVICES[name]["environment"]
        assert environment["DATA_URL"].startswith(f"s3://{made}/")
        assert environment["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert SERVICES["pack"]["environment"]["DATA_URL"] == SERVICES["train"]["environment"]["DATA_URL"]


def test_credentials_are_the_documented_defaults() -> None:
    """No key, secret or password in the compose file is anything but MinIO's default for local use."""
    found = 0
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if any(word in name for word in ("KEY", "SECRET", "PASSWORD", "USER", "TOKEN")):
                assert value == DEFAULT
                found += 1
            elif name.startswith("MC_HOST"):
                assert value == f"http://{DEFAULT}:{DEFAULT}@minio:9000"
    assert found == 6


def test_ports_are_open_to_this_machine_only() -> None:
    """A server with default credentials listens on the loopback address."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_pinned() -> None:
    """Nobody's ``latest`` changes what runs."""
    for name, service in SERVICES.items():
        if name not in BUILT:
            assert service["image"].partition(":")[2] not in {"", "latest"}


def test_named_volumes_are_declared() -> None:
    """Each named volume that a service mounts is declared, and each one declared is used."""
    mounted = {mount.partition(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"])


def test_copied_files_exist_and_are_sent() -> None:
    """What the Dockerfile copies is in the repository, and ``.dockerignore`` lets it through."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    sources = copied_sources()
    assert {"streamshards", "examples", "pyproject.toml", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        sent = True
        for pattern in patterns:  # the last one that matches decides
            if fnmatch(source, pattern.removeprefix("!").rstrip("/")):
                sent = pattern.startswith("!")
        assert sent, source


def test_the_image_runs_unprivileged() -> None:
    """The last stage ends as a user that is not root, whom it has made."""
    last_stage = DOCKERFILE[max(number for number, words in enumerate(DOCKERFILE) if words[0] == "FROM") :]
    users = [words[1] for words in last_stage if words[0] == "USER"]
    assert users[-1:] == ["streamshards"]
    assert any("useradd" in words and "streamshards" in words for words in last_stage)


def test_the_image_is_given_no_secret() -> None:
    """No argument or variable of the image is named like a credential."""
    names = [word.partition("=")[0] for words in DOCKERFILE if words[0] in {"ARG", "ENV"} for word in words[1:]]
    assert names
    assert not [name for name in names if any(word in name for word in ("KEY", "SECRET", "PASSWORD", "TOKEN"))]
