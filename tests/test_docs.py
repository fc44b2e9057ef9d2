"""What the pages tell people to type, and the units that they tell them to install."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deployments.entries import read_entries

pytestmark = pytest.mark.no_server

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("sandbox/**/*.md")])
UNITS = sorted(ROOT.glob("deployments/systemd/*.service"))
_SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
# `make` installs into .venv and nobody is told to activate it.
_BARE = re.compile(r"^\s*(?:\w+=\S+ )*(?:sudo )?(?:prefect|python3?(?! -m venv)|pip|dbt) ")
_ORDERS = re.compile(r"`(prefect (?:block|worker|gcl|concurrency-limit|deployment|work-pool) [^`]+)`")


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_are_found(page: Path) -> None:
    """What is to be typed runs where `make` has installed it, without a virtual environment being active."""
    text = page.read_text()
    bare = [line for block in _SHELL.findall(text) for line in block.splitlines() if _BARE.match(line)]
    # Two pages speak of Prefect's command as such.
    orders = [one for one in _ORDERS.findall(text) if not one.startswith("prefect worker start")]
    assert bare + orders == []


def test_nothing_is_installed_from_an_index() -> None:
    """The project is on no index: neither a page nor an error tells people to install it from one."""
    folders = ("blocks", "deployments", "docs", "flows", "sandbox", "tasks")
    kinds = {".py", ".yml", ".yaml"}
    found = (file for name in folders for file in (ROOT / name).rglob("*") if file.suffix in kinds)
    # dbt's target folder is nobody's text, and other tests may be writing it.
    files = [*PAGES, *(file for file in found if "target" not in file.parts and file.is_file())]
    assert [_name(file) for file in files if "install 'elt-flows" in file.read_text()] == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit(unit: Path, tmp_path: Path) -> None:
    """A unit runs what is there as the user whom the page creates, and systemd understands it."""
    parsed = configparser.ConfigParser(strict=True, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit.read_text())
    service, page = parsed["Service"], (ROOT / "docs/services.md").read_text()
    program, *arguments = service["ExecStart"].split()
    assert program.startswith("/opt/elt/.venv/bin/")
    assert f" {service['User']}\n" in page.split("useradd", 1)[1]
    assert service["EnvironmentFile"] in page
    assert unit.name in page
    if arguments[0] == "-m":
        module = ROOT / arguments[1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    if analyze := shutil.which("systemd-analyze"):  # of the system, where there is one: it knows the keys
        here = tmp_path / unit.name
        here.write_text(unit.read_text().replace(program, shutil.which("true") or program))
        found = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True, timeout=60)  # noqa: S603
        # It reads others, too, and has its own to say of them.
        assert [line for line in found.stderr.splitlines() if unit.name in line] == []
        assert found.returncode == 0


def test_what_services_can_not_compile() -> None:
    """They may not write into the checkout: the page has what they import compiled when it is installed."""
    (block, *_) = _SHELL.findall((ROOT / "docs/services.md").read_text())
    assert "make -C /opt/elt setup PYTHONDONTWRITEBYTECODE=1" in block  # the Makefile then has uv compile
    (folders,) = re.findall(r"-m compileall -q (.+)", block)
    assert {*folders.split()} == {f"/opt/elt/{name}" for name in ("blocks", "deployments", "flows", "tasks")}


def test_how_many_deployments_there_are() -> None:
    """What the page shows of `make deploy` is what it says."""
    said = re.findall(r"(\d+) deploy(?:ed,|ments are)", (ROOT / "docs/deploying.md").read_text())
    assert [int(number) for number in said] == [len(read_entries())] * 2
