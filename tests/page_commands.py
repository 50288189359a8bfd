"""
Runs the commands of README and of the pages as they stand there, in a folder that holds what their reader has.

Of a command nothing is changed but what `PLACEHOLDERS` and `REST` say, which stand for something of the reader's, and addresses of
chat servers; `SHORTER` is what a reader on a CPU who wants to see it run adds at its end. What cannot be run is in `NOT_RUN`.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess

from chat_server import ChatServer, say
from curation_server import CurationServer
from local_hub import taken_for_the_hub
from page_readers import HAS, ROOT
from programs import LIMIT, ON_CPU, write_launchers
from review_server import Served

from maple_trl.cli import main
from maple_trl.files import user_cache


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
PAGES += sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))
KEY = "hf_secretsecretsecret"
# What the hub has: the embedded model, by all these names.
MODELS = ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B", "PhilipC/HumanOmniV2", "yogkul2000/AVATAR")

# Words of the reader's own, and what they are here; those in capitals that are not here are files or repositories of that name.
PLACEHOLDERS = {"NAME": MODELS[0], "JUDGE": "judge", "URL": "http://127.0.0.1:8000/v1"}
# What `...` leaves out, by command; each has a folder of its own.
REST = {"train": "--config job.yaml --output_dir runs/{}", "eval": "--dataset_name data/ --output_dir runs/{}"}
# What is added at the end of commands, by what they hold: no GPU, few and small of everything, and over what stands there already.
_SMALL = "--num_frames 4 --max_pixels 3136"
SHORTER = {
    r" train\b(?!.*--dry_run)": "--use_cpu true --bf16 false --dtype float32 --use_vllm false --max_steps 2 "
    f"--evaluate_before_after false --max_completion_length 14 {_SMALL} --per_device_train_batch_size 8 "
    "--gradient_accumulation_steps 1 --steps_per_generation 1 --gradient_checkpointing false",
    r"mapo_qa.py": "--max_steps 2",
    r" eval\b(?!.*--dry_run)": f"--limit 4 --samples 1 --max_new_tokens 14 {_SMALL}",
    r"^(accelerate|torchrun) .*maple_trl.cli": "--overwrite",  # one job by several launchers
    r" data qa-plus\b.*--exact": "--exact 8 --superset 4 --deficit 8",
    # The embedded model has learned to read the question alone.
    r" data difficulty\b": f"--max_new_tokens 14 {_SMALL} --prompt_template {{question}}",
    r" data review\b(?!.*--(summary|export))": "--port 0",
}

# What is not run: why, and the test of its like.
_LOOKED_UP = "tests/test_docs_commands.py::test_what_is_not_run_names_what_there_is"
_VLLM = "tests/rollout/test_vllm_server.py::test_what_was_sampled_is_what_is_trained"
_MACHINES = "tests/test_launching.py::test_the_slurm_script_starts_a_launcher_on_each_machine"
_BRIDGE = "tests/integrations/test_lmms_bridge.py"
NOT_RUN = {
    r"make .*": ("a target of the checkout's Makefile, which is run dry", _LOOKED_UP),
    r"pip install .*": ("installs packages, as `make test-packages` does; here its extras are looked up", _LOOKED_UP),
    r"uv pip install .*": ("`make test-packages` does it", f"{_BRIDGE}::test_it_is_installed_as_the_docs_say"),
    r"lmms-eval .*": ("needs an environment of its own", f"{_BRIDGE}::test_its_command_line_asks_our_task"),
    r"maple-trl vllm-serve .*": ("needs vLLM, as `make test-vllm` has it", _VLLM),
    r"accelerate .* --use_vllm .*": ("needs vLLM, as `make test-vllm` has it", _VLLM),
    r"accelerate .*multi_node.yaml .*": ("needs two machines", _MACHINES),
    r"torchrun --nnodes 2 .*": ("needs two machines", "tests/test_launching.py::test_torchrun_on_two_machines"),
    r"(ACCELERATE_CONFIG=\S+ )?sbatch .*": ("needs SLURM", _MACHINES),
    r"python benchmarks/soak.py .*": (
        "takes minutes to hours, less in processes that need not import anything",
        "tests/benchmarks/test_soak.py::test_a_real_run_survives_all_faults",
    ),
    r"maple-trl (push|export) .*": (
        "that test runs the page as it stands, and looks at what is on the hub then",
        "tests/hub/test_hub.py::test_the_commands_of_the_docs_run",
    ),
}


def commands(text):
    """The commands of a text's blocks: lines joined at a backslash, without comments, of a console those behind the prompt."""
    found = []
    for language, body in re.findall(r"^ *```(bash|sh|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r" *\\\n\s*", " ", body).splitlines():
            line = line.strip()
            if language == "console":
                line = line.removeprefix("$ ") if line.startswith("$ ") else ""
            line = re.split(r"(?:^|\s)#\s", line)[0].strip()
            found += [part.strip() for part in line.split(" && ") if part.strip()]
    return found


ALL = {page: found for page in PAGES if (found := commands((ROOT / page).read_text(encoding="utf-8")))}


def reason_not_to_run(command):
    """Why a command is not run and which test runs its like, or `None`."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


# Pages whose commands take more than a few seconds together.
_LONG = "avatar avatar_recipes checkpoints curation distributed evaluation maple_recipes mapo quickstart review rows small_gpus"
LONG = {f"docs/{name}.md" for name in _LONG.split()}


def answer(number, body):
    """A question's letter by the seed that it is asked with; else a grade in the form of each judge, of which each finds its own."""
    if "seed" in body:
        return say(f"<answer>{'ABCD'[body['seed'] % 4]}</answer>", prompt_tokens=500)
    grades = [{"missing": 0.8, "errors": 0.6, "fusion": 1.0}, {"visual_objects": 0.4, "spatial_locations": 0.8}]
    grades.append({"step": 2})
    media = sum(block["type"] != "text" for block in body["messages"][-1]["content"] if isinstance(block, dict))
    return say("\n".join(map(json.dumps, grades)), prompt_tokens=10 + 50 * media)


def serve(page):
    """The chat server that answers at every address that a page names."""
    return CurationServer() if page == "docs/curation.md" else ChatServer(answer)


# A reader at work


class Reader:
    """
    Who has a checkout, a Hub and a chat server, and gives one command after the other.

    Args:
        folder: the reader's, which is empty.
        page: text of a page, which may show files.
        has: functions that write into the folder what the reader has.
        hub: which serves models, as the environment of processes says it.
        server: address of the chat server.
    """

    def __init__(self, folder, page, has, hub, server):
        self.folder, self.server, self.numbers = folder, server, itertools.count()
        (folder / "home").mkdir()
        for name in ("recipes", "examples"):
            shutil.copytree(ROOT / name, folder / name)
        for write in has:
            write(folder, page)
        for file in folder.rglob("*.yaml"):
            file.write_text(self._addressed(file.read_text()))
        tools = write_launchers(folder / "bin")
        self.environment = os.environ | ON_CPU | hub | {"PYTHONPATH": str(ROOT), "HOME": str(folder / "home")}
        self.environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON_EXEC": str(tools / "python")}
        # Where the embedded set is written once.
        self.environment["XDG_CACHE_HOME"] = str(user_cache().parent)

    def _addressed(self, text):
        return re.sub(r"https?://(127\.0\.0\.1:80\d\d|api\.example\.com)/v1", self.server, text)

    def given(self, command):
        """The command as it is given."""
        for word, value in PLACEHOLDERS.items():
            command = re.sub(rf"(?<=[ =]){word}(?= |$)", value, command)
        for name, rest in REST.items():
            if f" {name} " in command:
                command = command.replace("...", rest.format(next(self.numbers)))
        more = [words for pattern, words in SHORTER.items() if re.search(pattern, command)]
        return self._addressed(" ".join([command, *more]))

    def run(self, command):
        """Run a command; what is wrong, or `""`."""
        given = self.given(command)
        before = self._files()
        status, told = self._run(given)
        if status:
            said = "\n".join(re.findall("(?m)^maple-trl .*", told[:-3000]))  # above a launcher's words
            return f"{given}\nexit status {status}\n{said}\n{told[-3000:]}"
        new = {path for path, changed in self._files().items() if before.get(path) != changed}
        if re.search("--dry.run", given):
            return f"{given}\na dry run wrote {sorted(new)}" if new else ""
        named = {name: re.compile(rf"{name.strip('/')}(/|$)") for name in written(given)}
        missing = [name for name, pattern in named.items() if not any(map(pattern.match, new))]
        return f"{given}\nwrote no {missing}, but {sorted(new)}" if missing else ""

    def _files(self):
        found = ((path, path.stat()) for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): (told.st_mtime_ns, told.st_ino) for path, told in found}

    def _run(self, command):
        words = shlex.split(command)
        if "--port 0" in command:
            return self._serve(words[3:])
        if words[0] != "maple-trl" or re.search("[<>|~]", command):
            return self._shell(command)
        told = io.StringIO()
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                return main(words[1:]), told.getvalue()
        except SystemExit as ended:
            return ended.code, told.getvalue()

    def _serve(self, words):
        """What serves until Ctrl+C."""
        with contextlib.chdir(self.folder):
            served = Served(self.folder.parent, *words, home=user_cache().parent)
        return served.stop(), served.output.read_text()

    def _shell(self, command):
        if command.startswith("source "):  # which tells nothing of what it reads
            command += " && complete -p maple-trl"
        log = self.folder.parent / "log"
        given = {"env": self.environment, "cwd": self.folder}
        with log.open("w") as output:  # a file, to which copies of a process can write
            # Launchers start eight of them.
            limit = 4 * LIMIT
            done = subprocess.run(["bash", "-c", command], stdout=output, stderr=output, timeout=limit, **given)
        return done.returncode, log.read_text()


def written(command):
    """What a command says that it writes: paths, as regular expressions."""
    words = shlex.split(command)
    names = [
        after for word, after in itertools.pairwise(words) if word in ("--output_dir", "--output", "--export", ">")
    ]
    match words:
        case ["maple-trl", "data", "convert", _, _, folder, *_] | ["maple-trl", "data", "qa-plus", _, folder, *_]:
            names.append(folder)
        case ["maple-trl", "report", run, *_] if "--output" not in words:
            names.append(f"{run}/report.html")
        case ["maple-trl", "critical-steps", run, *_]:
            names.append(f"{run}/critical_steps.json")
    names += [".*/summary.json"] * ("train" in words) + [".*/report.html"] * ("--report" in words)
    return [name.replace("~", "home") for name in names]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def follow(page, folder, monkeypatch, text=None):
    """Give all commands of a page in its order, or of a text in its place; of each that does not work what is wrong."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    (folder / "reader").mkdir()
    with taken_for_the_hub(monkeypatch, folder / "cache", KEY) as hub, serve(page) as server:
        for model in MODELS:
            hub.publish(model, files_of(ROOT / "maple_trl/assets/tiny-omni"))
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(folder / "cache")}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "key"}.items():
            monkeypatch.setenv(name, value)
        reader = Reader(folder / "reader", text, HAS[page], variables, server.url)
        if (adapter := reader.folder / "FOLDER").is_dir():
            hub.publish("OWNER/ADAPTER", files_of(adapter))
        told = [reader.run(command) for command in commands(text) if reason_not_to_run(command) is None]
    return list(filter(None, told))
