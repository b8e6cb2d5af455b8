"""Copies of this project in which real Snakemake and DVC run, at the smallest scale."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a user has who types `snakemake` in an environment that is not activated, and under no other run.
OURS = ("DVC", "GIT", "PYTEST", "SNAKEMAKE", "SWCONV")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(OURS)},
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a project in which all of Table 2 was made are slow ones."""
    for item in items:
        if "whole" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@dataclass
class Project:
    """A git repository with the files of this project."""

    root: Path
    environment = ENVIRONMENT

    def run(self, *command: str, code: int = 0) -> str:
        """Run to the end with this exit code; return what was printed, both streams."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == code, done.stdout[-6000:]
        return done.stdout

    def snakemake(self, *arguments: str, code: int = 0) -> str:
        return self.run("snakemake", *(() if "-n" in arguments else ("--cores", "all")), *arguments, code=code)

    def planned(self, *arguments: str) -> dict[str, int]:
        """How many jobs of each rule a dry run lists, the target rule left out."""
        lines = self.snakemake("--quiet", "reason", "-n", *arguments).splitlines()
        rules = [line.split()[1].rstrip(":") for line in lines if line.startswith(("rule ", "localrule "))]
        return {rule: rules.count(rule) for rule in set(rules) - {"all"}}

    def script(self, name: str, code: int = 0) -> str:
        return self.run("python", f"workflow/scripts/{name}", code=code)

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "test")

    def replace(self, path: str, old: str, new: str) -> None:
        file = self.root / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    def activate(self, profile: str, seeds: list[int], reports_folder: str) -> None:
        """Write params/active.yaml by hand, as a user does."""
        text = f"profile: {profile}\nseeds: {seeds}\nreports_folder: {reports_folder}\n"
        (self.root / "params/active.yaml").write_text(text)

    def keep_rows(self, *rows: str) -> None:
        """Cut Table 2 down to these rows, without controls."""
        file = self.root / "params/runs.yaml"
        text = re.sub(r"^    rows: .*$", f"    rows: [{', '.join(rows)}]", file.read_text(), count=1, flags=re.MULTILINE)
        file.write_text(re.sub(r"^    controls: .*$", "    controls: []", text, count=1, flags=re.MULTILINE))

    def copy(self, root: Path) -> "Project":
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)

    def results(self) -> dict[str, str]:
        """Start of every job that made a result: another job, another start."""
        return {str(path.relative_to(self.root)): path.read_text() for path in self.root.glob("artifacts/*/*/*/seed*/run.json")}


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """As a clone is: the files that git knows or would add, each newer than the one before, and nothing made."""
    project = Project(tmp_path_factory.mktemp("fresh") / "project")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, project.root / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for name in ("dvc.lock", "reports/table2.md", "reports/table2.csv", "reports/table2.provenance.json"):
        (project.root / name).unlink(missing_ok=True)
    project.activate("smoke", [0], "artifacts/smoke/reports")
    project.run("git", "init", "--quiet")
    project.commit()
    return project


@pytest.fixture(scope="session")
def whole(fresh: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With every row of Table 2 made by Snakemake, and committed. Tests that change something work on copies."""
    project = fresh.copy(tmp_path_factory.mktemp("whole") / "project")
    project.snakemake()
    project.commit()
    return project


@pytest.fixture
def finished(whole: Project, tmp_path: Path) -> Project:
    """A copy of `whole` to do with as one likes."""
    return whole.copy(tmp_path / "project")
