"""The page about runs: what it shows, and what it says of a folder that holds no run."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import hvd_lars

from hvd_lars.assemble.recorded import read_run
from hvd_lars.config.file import dump_config, load_config
from hvd_lars.data.identity import made_identity
from hvd_lars.errors import UserError
from hvd_lars.planning.site import Site
from hvd_lars.report import write_report
from hvd_lars.report.charts import Series, heat_map, line_chart
from hvd_lars.report.glance import troubles
from hvd_lars.report.page import make_page


def make_run(folder, ranks=2, top1=0.9, **values):
    """A run folder as the trainer leaves it, with one skipped step and a straggler."""
    folder.mkdir()
    overrides = [
        "train.duration=4 epochs",
        "schedule.warmup_duration=1 epochs",
        *(f"{k}={v}" for k, v in values.items()),
    ]
    config = load_config("digits", overrides)
    (folder / "config.yaml").write_text(dump_config(config))
    facts = {"host": "n<1>", "versions": {"torch": "2.11.0"}, "cores": 2}
    (folder / "environment.json").write_text(json.dumps(facts))
    run = [{"kind": "event", "step": 0, "epoch": 0.0, "event": "start", "world_size": ranks,
            "hosts": ["n1", "n2"]}]  # fmt: skip
    for step in range(5, 41, 5):
        run.append({
            "kind": "train", "step": step, "epoch": step / 10, "loss": 2.0 / step, "lr": 0.1,
            "images_per_second": 1000.0 + step, "step_seconds": 0.05, "data_seconds": 0.01,
            "forward_seconds": 0.01, "backward_seconds": 0.02, "communication_seconds": 0.001,
            "optimizer_seconds": 0.002, "rank_data_seconds": [0.01, 0.03],
            "rank_busy_seconds": [0.02, 0.02],
        })  # fmt: skip
        if step % 10 == 0:
            run.append({"kind": "eval", "step": step, "epoch": step / 10, "loss": 1.0 / step,
                        "top1": top1 * step / 40, "top5": 1.0})  # fmt: skip
    run.append({"kind": "event", "step": 40, "epoch": 4.0, "event": "stop", "reason": "finished"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run))
    names = ["features.0.weight", "features.0.bias"]
    layers = [
        {"kind": "layers", "step": step, "epoch": step / 10, "lr": 1.0,
         **{key: dict.fromkeys(names, value) for key, value in
            (("weight_norm", 2.0), ("gradient_norm", 0.5), ("trust_ratio", 1e-3 * step),
             ("rate", 1e-3), ("noise_trace", 4.0 * step), ("noise_signal", 0.0078125 * step))}}
        for step in (10, 20, 30)
    ]  # fmt: skip
    (folder / "layers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in layers))
    return folder


class Page(HTMLParser):
    """Tags and attributes of a page that is well formed."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links, self.loads = [], [], set(), [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids.add(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])
        self.loads += [attrs[k] for k in ("src", "href") if k in attrs and tag != "a"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    runs = [make_run(tmp_path / "lars"), make_run(tmp_path / "s&<gd>", **{"optimizer.name": "sgd"})]
    write_report(runs, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_a_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.loads == ["data:,"]
    assert "script" not in parsed.tags
    assert {link.removeprefix("#") for link in parsed.links} <= parsed.ids
    assert parsed.tags.count("section") == 8
    assert "url(" not in page
    assert "s&amp;&lt;gd&gt;" in page
    assert "<gd>" not in page


def test_a_page_shows_what_was_recorded(page):
    assert "90.00 %" in page  # top-1
    assert "1,022" in page  # images a second, the median
    assert "optimizer.name" in page and "lars</td><td>sgd" in page
    assert "rank 1 · n2" in page and "30.0" in page  # waits for data
    assert "recorded rates differ from the plan" in page
    assert "features.0.weight" in page
    assert "at epoch 3 the critical batch is about 510: at 1,024 each sample is worth 0.33" in page
    assert page.count("<svg") == 2 + 1 + 1 + 4 + 3 + 2


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for case in ("lars/b32", "sgd/b32", "sgd/b64"):
        (tmp_path / case).mkdir(parents=True)
        make_run(tmp_path / case / "seed-0")
    other = make_run(tmp_path / "lars/b32/seed-1")
    folders = [tmp_path / f"{case}/seed-0" for case in ("lars/b32", "sgd/b32", "sgd/b64")]
    write_report([*folders, other, folders[0]], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    names = ["lars/b32/seed-0", "sgd/b32/seed-0", "b64/seed-0", "seed-1"]
    assert f"<h1>{', '.join(names)}</h1>" in page
    legend = page[page.index('<ul class="legend">') :]
    assert all(f"</i>{name}</li>" in legend[: legend.index("</ul>")] for name in names)


def test_only_layers_with_a_trust_ratio_are_in_its_picture(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    plain = [r | {"trust_ratio": r["trust_ratio"] | {"features.0.bias": 1.0}} for r in run.layers]
    page = make_page([dataclasses.replace(run, layers=plain)])
    assert "Trust ratio λ, run: layers by step (left out: 1 without a ratio)" in page
    assert page.count(">features.0.bias</text>") == 1  # in the picture of norms
    sgd = [r | {"trust_ratio": dict.fromkeys(r["trust_ratio"], 1.0)} for r in run.layers]
    page = make_page([dataclasses.replace(run, layers=sgd)])
    assert "Trust ratio λ, run" not in page
    ratios = page[page.index("‖w‖ / ‖g‖ (no layer has a trust ratio), run: layers by step") :]
    assert ratios[: ratios.index("</svg>")].count("<rect") == 2 * 3
    assert '<p class="scale">4 ' in ratios  # 2.0 / 0.5


def test_exact_values_are_told_by_the_mouse_and_by_tables(page):
    assert "<title>lars: top-1, % 22.5 at epoch 1</title>" in page
    assert "<title>lars: learning rate γ 0.1 at step 40</title>" in page
    numbers = page[page.index("Top-1 accuracy by epoch") :]
    assert '<th scope="row">4</th><td>90</td><td>90</td>' in numbers[: numbers.index("</details>")]


def test_what_went_wrong_is_said_first(tmp_path):
    fine = make_run(tmp_path / "fine")
    run = read_run(fine)
    assert troubles(run) == ["waits for input take 20% of a step (median, rank 0)"]
    quick = [r | {"data_seconds": 0.001} for r in run.train]
    good = dataclasses.replace(run, train=quick)
    assert troubles(good) == []
    assert "Nothing went wrong" in make_page([good])
    start, stop = run.events
    again = start | {"event": "resume", "step": 20, "world_size": 1}
    spoilt = {"step": 10, "event": "replaced", "image": "a.jpg: cut off"}
    straggler = {"step": 20, "event": "straggler", "rank": 1, "host": "n2"}
    bad = dataclasses.replace(
        good,
        train=[*quick[:-1], quick[-1] | {"loss": None, "skipped_steps": 2}],
        events=[start, spoilt, straggler, stop | {"reason": "SIGTERM"}, again],
    )
    assert troubles(bad) == [
        "no end is recorded after step 40: it is running, or was killed",
        "the last loss is not finite: training diverged",
        "1 unreadable images were replaced by others",
        "2 steps were skipped, as a gradient was not finite",
        "started 2 times, with 2 → 1 ranks",
        "rank 1 on n2 was slower than the others, last at step 20",
    ]
    stopped = dataclasses.replace(good, events=[start, stop | {"reason": "SIGTERM"}])
    assert troubles(stopped) == ["stopped at step 40: SIGTERM"]
    resumed = dataclasses.replace(good, events=[start, stop | {"reason": "SIGTERM"}, again, stop])
    assert troubles(resumed) == ["started 2 times, with 2 → 1 ranks"]
    page = make_page([bad])
    assert page.index("What went wrong") < page.index('id="batch"')


def test_ten_runs_have_ten_colours_and_are_folded(tmp_path):
    runs = [read_run(make_run(tmp_path / f"run{n}", top1=0.5 + 0.04 * n)) for n in range(10)]
    page = make_page(runs)
    Page(page)
    assert {f'class="line c{n}"' for n in range(10)} <= set(re.findall(r'class="line c\d"', page))
    assert page.count("<details><summary>run7</summary>") == 3
    assert len(page) < 1_500_000


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])
    (folder / "layers.jsonl").unlink()
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    Page(page)
    assert "running, or killed" in page
    assert "no norms of layers were recorded" in page
    assert "No gradient noise scale was recorded" in page


def test_a_run_whose_statistics_span_ranks_has_a_plan(tmp_path):
    run = read_run(make_run(tmp_path / "run", **{"model.bn_sync_ranks": 2}))
    assert len(run.planned) == 40


def test_the_plan_is_the_schedule_of_the_config(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.planned[0][0] == 1
    assert run.planned[-1][0] == 40
    assert max(rate for _, rate in run.planned) == pytest.approx(32.0, rel=0.2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.yaml").unlink(), "not a run folder: no config.yaml in it"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "no step has been recorded yet"),
        (lambda f: (f / "metrics.jsonl").write_text("x\n{}\n"), "line 1 is not a record: b'x'"),
        (lambda f: (f / "environment.json").write_text("{"), "environment.json: cannot be read"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, damage, message):
    folder = make_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(UserError) as caught:
        write_report([folder], tmp_path / "report.html")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no/report.html: cannot be written: No such file"):
        write_report([make_run(tmp_path / "run")], tmp_path / "no/report.html")


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [float("nan"), 1.0], [0.0, 1e-9, 1e9]])
@pytest.mark.parametrize("log", [True, False])
def test_charts_take_any_numbers(values, log):
    chart = line_chart("t", [Series("s", list(enumerate(values)), 0)], "x", "y", log_y=log)
    assert "nan" not in chart and "inf" not in chart
    assert "<polyline" in chart


def test_empty_charts_say_so():
    assert "nothing was recorded" in line_chart("t", [Series("s", [], 0)], "x", "y")
    assert "nothing was recorded" in heat_map("t", ["a"], ["1"], [[0.0]])


def test_a_chart_places_points_where_they_belong():
    chart = line_chart("t", [Series("s", [(0, 0), (10, 100)], 0)], "x", "y")
    assert 'points="74.0,260.0 706.0,12.0"' in chart


def test_a_page_of_a_thousand_layers_and_steps_is_small(tmp_path):
    folder = make_run(tmp_path / "run")
    names = [f"layer{i}.weight" for i in range(160)]
    with Path(folder / "layers.jsonl").open("w") as file:
        for step in range(1, 1001):
            columns = {key: dict.fromkeys(names, 1e-3 * step) for key in
                       ("weight_norm", "gradient_norm", "trust_ratio", "rate")}  # fmt: skip
            record = {"kind": "layers", "step": step, "epoch": step / 10, "lr": 1.0, **columns}
            file.write(json.dumps(record) + "\n")
    write_report([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_images_that_pack_made_smaller_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    identity = made_identity("x", 5, 3, 2)
    (run / "data.json").write_text(json.dumps(identity.record()))
    assert "images packed with" not in write(tmp_path, run)
    smaller = dataclasses.replace(identity, prepared="shorter side 320, JPEG quality 90")
    (run / "data.json").write_text(json.dumps(smaller.record()))
    page = write(tmp_path, run)
    assert "images packed with" in page
    assert "shorter side 320, JPEG quality 90" in page


def write(tmp_path, run):
    write_report([run], tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_run_is_compared_with_a_sites_plan(tmp_path):
    compute = ((16.0, 0.01), (64.0, 0.04))
    site = Site("digits", 2, 2, 1000, compute, ((4e3, 1e-4), (1e8, 1e-2)), None, 1.0)
    page = make_page([read_run(make_run(tmp_path / "a", ranks=2))], site)
    assert "Plan and run" in page
    assert "measurements of digits on 2 ranks" in page
    assert "faster than planned" in page
    more = read_run(make_run(tmp_path / "more", ranks=5))  # no record of five ranks
    assert "more: no step to compare is recorded yet." in make_page([more], site)
    (tmp_path / "site.json").write_text(site.text())
    code, output = hvd_lars("report", str(tmp_path / "a"), "--site", str(tmp_path / "a"), "-o",
                            str(tmp_path / "page.html"))  # fmt: skip
    assert (code, "--site: " in output) == (2, True)
