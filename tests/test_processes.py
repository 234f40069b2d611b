"""Two processes that train one model: the same scores as one, the same plan in both, one that writes."""

from __future__ import annotations

import ast
import atexit
import json
import os
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cpd
from cpd import processes
from cpd.files.checkpoint import Checkpoint
from cpd.jobs.request import checkpoint_of
from cpd.surgery.calibration import Calibration
from cpd.surgery.compensation import refit
from cpd.surgery.recovery import recover
from helpers.forks import ALONE, started
from helpers.training import X, loader, net

HERE = Path(__file__).parent

SCRIPT = """
import sys
import test_processes
from helpers.hasty import hasten
hasten()
test_processes.tell(*sys.argv[1:])
"""


def tell(job: str, folder: str) -> None:
    """What a process does: a function of this file, whose result the first one writes."""
    found = globals()[job](folder)
    if os.environ.get("RANK", "0") == "0":
        print("FOUND" + json.dumps(found))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launched(job: str, folder: Path, count: int, machines: int = 1) -> tuple[object, str]:
    """What a function of this file gives in so many processes of `accelerate launch`, on so many "machines"."""
    (folder / "job.py").write_text(SCRIPT)
    several = ["--multi_gpu"] if count > 1 else []  # the launcher's word for it; without GPUs gloo joins CPUs
    port = str(free_port())
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(count),
             "--num_machines", str(machines), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
             "--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no",
             str(folder / "job.py"), job, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **ALONE},
        )
        for rank in range(machines)
    ]  # fmt: skip
    said = "".join(launcher.communicate(timeout=300)[0] for launcher in launchers)
    return told(said, not any(launcher.returncode for launcher in launchers))


def forked(job: str, folder: Path, count: int, *, check: bool = True) -> tuple[object, str]:
    """The same in processes that need not import anything, with the environment that launchers give."""
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"rank{rank}.txt" for rank in range(count)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    ranks = [
        started(
            "test_processes:tell", job, str(folder), output=output,
            environment={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    for process in ranks:
        process.join(300)
        process.kill()
    ends = [process.exitcode for process in ranks]
    said = "".join(map(Path.read_text, outputs))
    assert set(ends) <= {0, 1}, said  # none had to be killed
    return told(said, not any(ends) or not check)


def told(said: str, well: bool) -> tuple[object, str]:
    """What the first process has found, and all that they said."""
    assert well, said[-3000:]
    found = [line.removeprefix("FOUND") for line in said.splitlines() if line.startswith("FOUND")]
    return json.loads(found[0]) if found else None, said


def batches_of(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """48 images in batches of a size, in the same order."""
    images, labels = (torch.cat(parts) for parts in zip(*loader(6), strict=True))
    return list(zip(images.split(size), labels.split(size), strict=True))


def job_scores(folder: str) -> dict[str, object]:
    """Scores of every criterion, each process on its share of batches of half the size."""
    processes.start()
    count = processes.count()
    model = net()
    combed = cpd.comb(model, X)
    data = processes.Share(batches_of(16 // count))
    return {
        criterion: {
            name: value.tolist()
            for name, value in cpd.score(model, combed, data, criterion=criterion, total=processes.total).items()
        }
        for criterion in ("taylor", "snip", "hessian", "fisher", "apoz", "magnitude", "obs")
    }


class Plain(nn.Module):
    """Without batch statistics, so that a batch in two halves is the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def job_threads(folder: str) -> int:
    """The number of threads, where the program has set one and the launcher none."""
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(1)
    with patch("psutil.cpu_count", return_value=8), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processes.start()
    return torch.get_num_threads()


def job_compress(folder: str) -> dict[str, object]:
    """A run that shrinks three times while it is trained, two batches a step; in a folder named so, it ends early."""
    processes.start()
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        if Path(folder).name == "killed" and not Path(folder, "again").exists() and len(calls) == 4:
            raise ValueError("power failure")
        return 0.0

    result = cpd.compress(
        Plain(), target_macs=0.5, data=DataLoader(Images(), 8 // processes.count()), example_inputs=X[:1], epochs=4,
        lr=0.02, criterion="taylor", round_to=1, schedule=cpd.Schedule("linear", end=0.8, interval=3),
        output_dir=Path(folder) / f"out{processes.count()}", evaluate=evaluate, resume=True,
        training=cpd.DistillConfig(kd="mse", features=["body.2"], accumulate=2, keep_best=False),
    )  # fmt: skip
    weights = {name: value.tolist() for name, value in result.model.state_dict().items()}
    processes.check_same(str(weights), "student")
    return {
        "digest": result.plan.digest, "loss": [row["loss"] for row in result.report.history], "weights": weights,
    }  # fmt: skip


class Blocks(nn.Module):
    """Residual blocks, the later of which give little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 1)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for share, block in zip((1.0, 0.05, 0.02), self.blocks, strict=True):
            x = torch.relu(x + share * block(x))
        return self.head(x.mean((2, 3)))


def job_branches(folder: str) -> dict[str, object]:
    """A run that removes branches beside channels."""
    processes.start()
    result = cpd.compress(
        Blocks(), target_macs=0.4, data=batches_of(16 // processes.count()), example_inputs=X[:1], epochs=1, lr=0.01,
        round_to=1, max_ratio=0.3, output_dir=Path(folder) / f"out{processes.count()}",
    )  # fmt: skip
    processes.check_same(result.plan.digest, "plan")
    processes.check_same(str([p.sum().item() for p in result.model.parameters()]), "student")
    return {"removed": result.plan.removed, "digest": result.plan.digest}


class Normed(nn.Module):
    """With BatchNorm and residuals, so that every kind of refit is tried."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner = nn.Sequential(nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1))
        self.head = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.inner(x)).relu().mean((2, 3)))


class Images(Dataset[tuple[torch.Tensor, int]]):
    """48 images, and which of them were read."""

    def __init__(self) -> None:
        self.images, self.labels = (torch.cat(parts) for parts in zip(*loader(6), strict=True))
        self.read = set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.add(index)
        return self.images[index], int(self.labels[index])


def job_refit(folder: str) -> dict[str, object]:
    """Scores, plan and refits; each process sees and holds its own samples alone."""
    processes.start()
    size, images, found = 16 // processes.count(), Images(), {}
    for kind, data in {"loader": DataLoader(images, size), "list": batches_of(size)}.items():
        pruner = cpd.Pruner(
            Normed(), X[:1], target_macs=0.4, steps=0, data=data, criterion="taylor", round_to=1
        )  # fmt: skip
        pruner.prune()
        weights, recovery = pruner.model.state_dict(), pruner.recovery
        processes.check_same(str([value.sum().item() for value in weights.values()]), "weights")
        found[kind] = {
            "digest": pruner.plan.digest, "chosen": recovery.chosen, "errors": recovery.errors,
            "samples": recovery.samples, "agreements": recovery.agreements,
            "weights": {name: value.tolist() for name, value in weights.items()},
            "held": sum(part.call.samples for part in Calibration(Normed(), data, together=True).parts),
        }  # fmt: skip
    return {**found, "read": len(images.read)}


def job_sparse(folder: str) -> dict[str, object]:
    """Masks chosen by scores and weights that are refitted, in stages."""
    processes.start()
    model = Normed()
    sparsifier = cpd.Sparsifier(model, 0.8, steps=0, data=batches_of(16 // processes.count()), criterion="taylor")
    sparsifier.prune()
    plain = cpd.Sparsifier(
        Normed(), 0.5, steps=0, data=batches_of(16 // processes.count()), criterion="obs", compensation=False
    )
    plain.prune()  # whose masks are compared
    return {
        "masks": sparsifier.masks.digest, "errors": sparsifier.recovery.errors,
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
    }  # fmt: skip


def job_uneven(folder: str) -> dict[str, object]:
    """Processes with unlike numbers of samples, which do not fit into memory at once, in a random order."""
    processes.start()
    torch.manual_seed(processes.rank())  # what each has drawn before
    images = torch.cat([Images().images, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))])
    data = DataLoader(TensorDataset(images, torch.zeros(52)), 13, shuffle=True)
    model, narrow = Normed(), Normed()
    plan = cpd.comb(model, X[:1]).plan({"inner.0": range(12)})
    cpd.shrink(narrow, plan)
    calibration = Calibration(model, data, together=True, memory_gb=2e-4)
    found = recover(narrow, calibration, plan)
    processes.check_same(str([value.sum().item() for value in narrow.state_dict().values()]), "weights")
    mine = torch.cat([part.call.args[0] for part in calibration.parts])
    return {
        "parts": len(calibration.parts), "most": processes.most(len(calibration.parts)), "all": calibration.samples,
        "errors": found.errors, "sum": float(processes.total(mine.double().sum())),
        "expected": float(images.double().sum()),
    }  # fmt: skip


class Unlike(Normed):
    """Goes another way on some data, from the second model on."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.narrow and processes.rank() == 1:
            raise ValueError("not on this machine")
        return super().forward(x)


def job_fail_on_second(folder: str) -> str | None:
    """A narrower model that fails in one process alone is told of in all of them, and is not compensated."""
    processes.start()
    model, narrow = Unlike(), Unlike()
    plan = cpd.comb(model, X[:1]).plan({"inner.0": range(12)})
    calibration = Calibration(model, batches_of(8), together=True)
    cpd.shrink(narrow, plan)
    narrow.narrow = True
    with pytest.raises(cpd.InputError) as failure:
        refit(narrow, calibration, plan)
    narrow.narrow = False
    refit(narrow, calibration, plan)  # all are in step again
    return str(failure.value)


def job_disagree(folder: str) -> None:
    """Every rank with weights of its own."""
    processes.start()
    model = Plain()
    with torch.no_grad():
        model.body[0].weight += torch.randn(
            model.body[0].weight.shape, generator=torch.Generator().manual_seed(processes.rank())
        )
    with suppress(cpd.TrainingError) if folder.endswith("later") else nullcontext():
        cpd.compress(model, target_macs=0.5, example_inputs=X[:1], round_to=1)
    cpd.Pruner(model, X[:1], target_macs=0.5, steps=1, round_to=1, criterion="magnitude").prune()


def job_fail_on_first(folder: str) -> None:
    """What rank 0 cannot do stops all."""
    processes.start()
    processes.from_first(lambda: 1 / 0)


def threads_of_gloo() -> list[str]:
    """Names of the threads that exchange tensors, which Linux tells."""
    return [name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())]


def job_end(folder: str) -> list[str]:
    """The end of a program: what is left to run after Python has gone aborts the process, now and then."""
    atexit.register(lambda: threads_of_gloo() and os._exit(1))  # the first registered is the last to run
    processes.start()
    processes.check_same("a", "letter")
    return threads_of_gloo()


@pytest.mark.skipif(
    sys.platform != "linux" or torch.__version__ < "2.14", reason="asks /proc for threads, which torch names since 2.14"
)
def test_no_thread_outlives_the_program(tmp_path: Path) -> None:
    found, _ = launched("job_end", tmp_path, 2)
    assert found


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """By `obs` each orders some of the groups; both draw the directions and places of one."""
    one, _ = forked("job_scores", tmp_path / "one", 1)
    two, _ = forked("job_scores", tmp_path / "two", 2)
    assert list(one["obs"]) == list(two["obs"])
    for name, values in one["obs"].items():
        assert two["obs"][name] == pytest.approx(values, rel=1e-3), name
    for criterion, groups in one.items():
        for name, values in groups.items():
            found, expected = torch.tensor(two[criterion][name]), torch.tensor(values)
            most = 1e-3 if criterion == "obs" else 1e-4  # inverses enlarge what rounding differs by
            assert float((found - expected).abs().max() / expected.abs().max()) < most, (criterion, name)


def test_threads_that_a_program_has_set_stay_as_they_are(tmp_path: Path) -> None:
    assert forked("job_threads", tmp_path, 2)[0] == 1


def test_two_machines_make_the_plan_of_one_process_and_one_of_them_writes(tmp_path: Path) -> None:
    one, _ = forked("job_compress", tmp_path, 1)
    two, _ = launched("job_compress", tmp_path, 2, machines=2)
    assert one["digest"] == two["digest"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert alike(two, one, "weights")
    assert {path.name for path in (tmp_path / "out2").iterdir()} == {
        path.name for path in (tmp_path / "out1").iterdir()
    }
    assert cpd.load(tmp_path / "out2", model=Plain()) is not None
    _, said = forked("job_compress", tmp_path / "killed", 2, check=False)
    assert "power failure" in said
    assert (tmp_path / "killed" / "out2" / "checkpoint.safetensors").exists()
    (tmp_path / "killed" / "again").touch()
    again, said = forked("job_compress", tmp_path / "killed", 2)
    assert (again["digest"], again["weights"]) == (two["digest"], two["weights"])


def job_resume_apart(folder: str) -> None:
    """Each process with a folder of its own, of which one holds a checkpoint."""
    processes.start()
    own = Path(folder) / f"machine{processes.rank()}"
    checkpoint = Checkpoint(own, {})
    if processes.rank() == 0:
        own.mkdir()
        checkpoint.write({"weights": torch.zeros(1)})
    monkey = pytest.MonkeyPatch()
    monkey.setattr("cpd.jobs.request.Checkpoint", lambda *_: checkpoint)
    checkpoint_of(own, True, 1, cpd.PruneConfig(target_macs=0.5), cpd.DistillConfig(), Plain(), {})


def test_a_checkpoint_that_one_machine_alone_can_read_is_told(tmp_path: Path) -> None:
    _, said = forked("job_resume_apart", tmp_path, 2, check=False)
    assert "rank [1] differ from rank 0 in the checkpoint. Let output_dir be one folder" in said


def test_branches_are_chosen_alike_in_every_process(tmp_path: Path) -> None:
    found = {
        job: forked("job_branches", tmp_path / job, count)[0] for job, count in (("one", 1), ("again", 1), ("two", 2))
    }
    assert found["one"] == found["again"]
    assert found["one"]["removed"]
    assert found["two"]["removed"] == found["one"]["removed"]  # which sees half of each batch


def alike(found: dict[str, object], expected: dict[str, object], what: str) -> bool:
    """Whether tensors by name are equal but for rounding."""
    return all(
        torch.allclose(torch.tensor(found[what][name]), torch.tensor(values), rtol=1e-3, atol=1e-4)
        for name, values in expected[what].items()
    )


def test_refits_are_shared_and_come_out_as_those_of_one_process(tmp_path: Path) -> None:
    one, _ = forked("job_refit", tmp_path / "one", 1)
    two, _ = forked("job_refit", tmp_path / "two", 2)
    assert (one["read"], two["read"]) == (48, 36)  # half to score, half to refit
    for kind in ("loader", "list"):
        found, expected = two[kind], one[kind]
        assert (expected["held"], found["held"]) == (48, 24)  # of the first process
        assert found["samples"] == expected["samples"] == 48
        assert (found["digest"], found["chosen"]) == (expected["digest"], expected["chosen"])
        assert "compensation" in found["chosen"]
        for name in ("nothing", "compensation", "compensation with BatchNorm"):
            assert found["errors"][name] == pytest.approx(expected["errors"][name], rel=1e-3), name
            assert found["agreements"][name] == pytest.approx(expected["agreements"][name]), name
        assert alike(found, expected, "weights")


def test_masks_are_chosen_and_refitted_as_by_one_process(tmp_path: Path) -> None:
    one, _ = forked("job_sparse", tmp_path / "one", 1)
    two, _ = forked("job_sparse", tmp_path / "two", 2)
    assert two["masks"] == one["masks"]
    assert two["errors"] == pytest.approx(one["errors"], rel=1e-2)
    assert alike(two, one, "weights")


def test_processes_of_unlike_many_samples_wait_for_one_another(tmp_path: Path) -> None:
    found, _ = forked("job_uneven", tmp_path, 2)
    assert found["all"] == 52
    assert found["sum"] == pytest.approx(found["expected"])  # each sample is one process's
    assert found["parts"] == found["most"] > 3
    assert found["errors"]["compensation"] < found["errors"]["nothing"]


def test_what_fails_in_one_process_fails_in_all(tmp_path: Path) -> None:
    found, said = forked("job_fail_on_second", tmp_path, 2)
    assert "another process" in found, said


def test_processes_that_disagree_are_named(tmp_path: Path) -> None:
    _, said = forked("job_disagree", tmp_path, 2, check=False)
    assert "rank [1] differ from rank 0 in the weights of the model" in said
    _, said = forked("job_disagree", tmp_path / "later", 2, check=False)
    assert "rank [1] differ from rank 0 in the plan" in said


def test_a_failure_of_the_first_ends_all(tmp_path: Path) -> None:
    _, said = forked("job_fail_on_first", tmp_path, 2, check=False)
    assert "ZeroDivisionError" in said
    assert "Rank 0 failed" in said


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    for label in range(2):
        folder = tmp_path / "images" / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (32, 32), (120 * label, 20 * index, 90)).save(folder / f"{index}.png")
    out = tmp_path / "out"
    options = (
        f"compress timm:test_resnet,num_classes=2 --no-pretrained --input-size 32 --data {tmp_path / 'images'} "
        f"--target-macs 0.5 --criterion taylor --schedule linear --interval 2 --batch-size 2 --workers 0 --epochs 2 "
        f"--output-dir {out} --json"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    done = subprocess.run(
        [*launcher, str(free_port()), "-m", "helpers.hasty", *options.split()], capture_output=True, text=True,
        timeout=300, env={**os.environ, **ALONE}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])  # of the first process alone
    assert report["result"]["macs"] <= 0.5 * report["original"]["macs"]
    assert len(report["shrinks"]) > 1
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "model.onnx", "recipe.yaml"} <= names
    assert "checkpoint.safetensors" not in names
    assert cpd.load(out).training is False


def test_one_process_needs_nothing() -> None:
    assert (processes.count(), processes.rank()) == (1, 0)
    assert torch.equal(processes.total(torch.ones(2)), torch.ones(2))
    assert processes.from_first(lambda: 5) == 5
    assert list(processes.Share([1, 2, 3], 2)) == [1, 2]
    processes.check_same("a", "plan")


def test_nothing_that_a_file_holds_is_unpickled() -> None:
    """Objects are pickled between processes by `from_first` alone, which takes what was made in memory."""
    wanted = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    loads = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "package")}
    found = []
    for path in sorted((HERE.parent / "cpd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.partition(".")[0] in wanted]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)] if str(node.module).partition(".")[0] in wanted else []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                read = (node.value.id, node.attr) in loads or ("_object" in node.attr and node.value.id == "dist")
                names = [node.attr] if read else []
            found += [(path.name, name) for name in names]
    assert found == [("processes.py", "broadcast_object_list")]
