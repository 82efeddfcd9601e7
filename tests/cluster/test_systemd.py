"""The shipped units restart after failures, keep Ray apart from the daemon, and use modules and options that exist."""

import configparser
import importlib.util
import shlex
from pathlib import Path

import pytest

from flows.ui import _parse

UNITS = Path(__file__).resolve().parents[2] / "cluster" / "systemd"
NAMES = ("recycle-ray.service", "recycle-daemon.service")


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_restarts_what_fails_without_a_limit_and_kills_all_that_it_started(name: str) -> None:
    service = unit(name)["Service"]
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "control-group")
    assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"
    assert (service["User"], service["NoNewPrivileges"], service["UMask"]) == ("recycle", "true", "0077")


def test_the_daemon_does_not_take_ray_along() -> None:
    daemon = unit("recycle-daemon.service")["Unit"]
    assert daemon["Wants"] == daemon["After"] == "recycle-ray.service"
    assert daemon["RequiresMountsFor"] == "/mnt/shared", "an empty folder must not take the place of the storage"
    assert not {"Requires", "BindsTo", "PartOf"} & set(daemon) | {"Requires", "BindsTo", "PartOf"} & set(
        unit("recycle-ray.service")["Unit"]
    )


def test_the_daemon_runs_the_web_pages_module_with_options_that_it_knows() -> None:
    _, dash_m, module, *options = shlex.split(unit("recycle-daemon.service")["Service"]["ExecStart"])
    assert (dash_m, module) == ("-m", "flows.ui")
    assert importlib.util.find_spec(module) is not None
    assert _parse(options).override == ["schedule.active=true", "schedule.existing_storage=true"]
    waits = shlex.split(unit("recycle-daemon.service")["Service"]["ExecStartPre"])
    assert waits[1:3] == ["-m", "cluster.local"]


def test_rays_dashboard_and_jobs_api_stay_on_loopback() -> None:
    text = (UNITS / "recycle-ray.service").read_text()
    assert "--dashboard-host=127.0.0.1" in text
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in text
    assert "--block" in text, "systemd must see it end"
