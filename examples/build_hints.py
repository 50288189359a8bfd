"""
Hints from Python: a teacher behind an OpenAI-compatible endpoint writes one for each row of a table, and those that give the
answer away are refused (the hints of AVATAR, arXiv 2508.03100).

    python examples/build_hints.py --base_url http://127.0.0.1:8000/v1 --model NAME

The command `maple-trl data hints` does the same with more options. A key is read from OPENAI_API_KEY where the server asks for
one; `pip install "maple-trl[judge]"` brings the client.
"""

import argparse

from maple_trl.chat import ChatClient, ChatOptions
from maple_trl.data import default_folder
from maple_trl.data.hints import HintOptions, build_hints


def main() -> None:
    parser = argparse.ArgumentParser(description="Hints for the embedded data.")
    parser.add_argument("--model", required=True, help="the teacher's name, as the server knows it")
    parser.add_argument("--base_url", help="root of the API; default is OpenAI's")
    parser.add_argument(
        "--input", default=str(default_folder() / "train.parquet"), help="rows with prompt and solution"
    )
    parser.add_argument("--output", default="runs/hints/train.parquet", help="the same rows with a column `hint`")
    parser.add_argument("--rows", type=int, default=16, help="rows to ask for, from the first one on")
    options = parser.parse_args()

    teacher = ChatOptions(
        model=options.model,
        base_url=options.base_url,
        concurrency=8,
        sampling={"temperature": 0.7, "max_tokens": 1024},
        # Answers are kept: the second run of this script sends nothing.
        cache_file=options.output + ".cache.sqlite",
    )
    # Four pictures of each clip and the text of its subtitles, beside question, options and answer.
    shown = HintOptions(columns=["subtitle"], frames=4, limit=options.rows)
    with ChatClient(teacher) as client:
        summary = build_hints(options.input, options.output, client, shown)

    print(f"{summary.hinted} of {summary.asked} rows have a hint; it took {summary.usage.sent} calls")
    print(f"refused: {dict(summary.refused)}, failed: {dict(summary.failed)}")


if __name__ == "__main__":
    main()
