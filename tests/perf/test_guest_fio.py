"""fio in a guest: what is put into it, and what is read off its console."""

import json
from pathlib import Path

from perf import guest_fio


def side(iops):
    percentiles = {"50.000000": 20_000, "99.000000": 90_000}
    return {
        "total_ios": iops,
        "iops": iops,
        "bw_bytes": iops * 4096,
        "clat_ns": {"mean": 30_000, "percentile": percentiles},
    }


def test_results_are_found_on_a_console():
    run = {"jobs": [{"read": side(0), "write": side(500), "usr_cpu": 10.0, "sys_cpu": 5.5}]}
    console = f"boot\r\nvvupipe-fio 1 4k-randwrite-d32 2\r\nnote\r\n{json.dumps(run, indent=1)}\r\nvvupipe-fio end\r\n"
    (record,) = guest_fio.parse_console(console.replace("\r\n", "\n"), ["a", "b"])
    assert (record["backend"], record["job"], record["round"], record["iops"]) == ("b", "4k-randwrite-d32", 2, 500)
    assert record["latency_us"] == {"mean": 30.0, "50": 20.0, "99": 90.0}
    assert record["guest_cpu_percent"] == 15.5


def test_every_job_runs_on_every_disk():
    script = guest_fio.guest_script(Path("/usr/bin/fio"), 3, ["4k-randread-d1", "128k-read-d32"], 2, 0.5)
    runs = [line for line in script.splitlines() if "--filename" in line]
    assert len(runs) == 12
    assert sum("--filename=/dev/vdc" in run for run in runs) == 4
    assert "--iodepth=1 " in runs[0]


def test_ratios_are_to_the_last_back_end():
    records = [
        {"backend": name, "job": "j", "iops": iops, "latency_us": {"50": 1.0}} for name, iops in (("a", 30), ("b", 20))
    ]
    assert "1.50" in guest_fio.summary(records).splitlines()[1]


def test_without_fio_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(guest_fio.shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["guest_fio"])
    assert guest_fio.main() == 2
    assert "install the package fio" in capsys.readouterr().err
