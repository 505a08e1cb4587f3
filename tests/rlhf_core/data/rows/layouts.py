"""One row of each layout that TRL, OpenRLHF and LLaMA-Factory document, and of public data sets,
and what it says.

Each entry is (name, purpose, row, turns, replies): the turns are (role, text, trained?), and the
replies are those of a pair or of a label. Written from the projects' documentation, in own words.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlhf_core.data.encoding.encode import EncodedBatch, Plan, encode_batch
from rlhf_core.data.rows.columns import Rules
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.formats import normalise
from rlhf_core.data.rows.row import RawRow
from rlhf_core.jobs import DataSettings

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go away"}
H, G = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
MORE = {"role": "user", "content": "And now?"}
LATER = {"role": "assistant", "content": "Goodbye"}

ASKED = ("user", "Hi", False)
SAID = ("assistant", "Hello", True)
HEARD = ("assistant", "Hello", False)  # a reply that is context
KIND = ("system", "Be kind.", False)
AGAIN = ("user", "And now?", False)
END = ("assistant", "Goodbye", True)
PAIR = ("Hello", "Go away")


def read(row: Any, purpose: str = "sft", **given: Any) -> Any:
    """The example of a single row."""
    settings = DataSettings(source="a.jsonl", **given)
    rows, format = find_format(iter([RawRow("a.jsonl", 1, row)]), settings, purpose)
    rules = Rules.of(settings, purpose, Counter())
    example = normalise(next(rows).columns(settings.columns), format, purpose, rules)
    return example, rules.notes


def encoded(tokenizer: Any, rows: list[Any], purpose: str, **given: Any) -> EncodedBatch:
    """The encoded rows, without files and worker processes."""
    settings = DataSettings(source="a.jsonl", max_length=4096, **given)
    raws = [RawRow("a.jsonl", number, row) for number, row in enumerate(rows, 1)]
    _, format = find_format(iter(raws), settings, purpose)
    return encode_batch(Plan(settings, format, purpose, 0), tokenizer, raws)


Layout = tuple[str, str, dict[str, Any], list[tuple[str, str, bool]], tuple[Any, ...]]

LAYOUTS: list[Layout] = [
    # TRL
    ("trl conversation", "sft", {"messages": [U, A, MORE, LATER]}, [ASKED, SAID, AGAIN, END], ()),
    ("trl prompt", "prompts", {"prompt": "Hi"}, [ASKED], ()),
    ("trl prompt messages", "prompts", {"prompt": [U, A, MORE]}, [ASKED, HEARD, AGAIN], ()),
    ("trl completion", "sft", {"prompt": "Hi", "completion": "Hello"}, [ASKED, SAID], ()),
    ("trl completion messages", "sft", {"prompt": [U], "completion": [A]}, [ASKED, SAID], ()),
    ("trl completion, history", "sft", {"prompt": [SYSTEM, U, A, MORE], "completion": [LATER]},
     [KIND, ASKED, HEARD, AGAIN, END], ()),
    ("trl pair", "preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
     [ASKED], PAIR),
    ("trl pair messages", "preference", {"prompt": [U], "chosen": [A], "rejected": [BAD]},
     [ASKED], PAIR),
    ("trl implicit prompt", "preference", {"chosen": [U, A], "rejected": [U, BAD]}, [ASKED], PAIR),
    ("trl unpaired", "unpaired", {"prompt": "Hi", "completion": "Hello", "label": True},
     [ASKED], ("Hello", True)),
    ("trl unpaired messages", "unpaired", {"prompt": [U], "completion": [BAD], "label": False},
     [ASKED], ("Go away", False)),
    # OpenRLHF
    ("openrlhf texts", "sft", {"input": "Hi", "output": "Hello"}, [ASKED, SAID], ()),
    ("openrlhf messages", "sft", {"input": [U, A, MORE], "output": [LATER]},
     [ASKED, HEARD, AGAIN, END], ()),
    ("openrlhf conversation", "sft", {"input": [U, A]}, [ASKED, SAID], ()),
    ("openrlhf question", "sft", {"prompt": "Hi", "response": "Hello"}, [ASKED, SAID], ()),
    ("openrlhf prompts", "prompts", {"input": "Hi", "datasource": "math"}, [ASKED], ()),
    ("openrlhf pair", "preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
     [ASKED], PAIR),
    ("openrlhf pair messages", "preference", {"chosen": [U, A], "rejected": [U, BAD]},
     [ASKED], PAIR),
    ("openrlhf label", "unpaired", {"prompt": "Hi", "output": "Hello", "label": 1},
     [ASKED], ("Hello", True)),
    # LLaMA-Factory
    ("factory alpaca", "sft",
     {"instruction": "Hi", "input": "", "output": "Goodbye", "system": "Be kind.",
      "history": [["Hi", "Hello"]]},
     [KIND, ASKED, SAID, ASKED, END], ()),
    ("factory alpaca input", "sft",
     {"instruction": "Say", "input": "Hi", "output": "Hello", "system": "", "history": []},
     [("user", "Say\n\nHi", False), SAID], ()),
    ("factory alpaca pair", "preference",
     {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"}, [ASKED], PAIR),
    ("factory alpaca kto", "unpaired",
     {"instruction": "Hi", "input": "", "output": "Hello", "kto_tag": True},
     [ASKED], ("Hello", True)),
    ("factory sharegpt", "sft", {"conversations": [H, G], "system": "Be kind.", "tools": ""},
     [KIND, ASKED, SAID], ()),
    ("factory sharegpt pair", "preference",
     {"conversations": [H], "chosen": G, "rejected": {"from": "gpt", "value": "Go away"}},
     [ASKED], PAIR),
    ("factory sharegpt kto", "unpaired", {"conversations": [H, G], "kto_tag": False},
     [ASKED], ("Hello", False)),
    ("factory openai", "sft", {"messages": [SYSTEM, U, A]}, [KIND, ASKED, SAID], ()),
    ("factory openai kto", "unpaired", {"messages": [U, A], "label": True},
     [ASKED], ("Hello", True)),
    ("factory openai pair", "preference", {"messages": [U, A, MORE], "chosen": LATER,
     "rejected": BAD}, [ASKED, HEARD, AGAIN], ("Goodbye", "Go away")),
    ("factory alpaca pair, history", "preference",
     {"instruction": "And now?", "input": "", "chosen": "Goodbye", "rejected": "Go away",
      "system": "Be kind.", "history": [["Hi", "Hello"]]},
     [KIND, ASKED, HEARD, AGAIN], ("Goodbye", "Go away")),
    ("factory alpaca kto, history", "unpaired",
     {"instruction": "And now?", "output": "Goodbye", "kto_tag": "false", "system": "Be kind.",
      "history": [["Hi", "Hello"]]}, [KIND, ASKED, HEARD, AGAIN], ("Goodbye", False)),
    # With the metadata that they come with
    ("verl", "prompts",
     {"data_source": "gsm8k", "prompt": [U], "ability": "math",
      "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}},
     [ASKED], ()),
    ("ultrafeedback binarized", "preference",
     {"prompt": "Hi", "prompt_id": "a", "chosen": [U, A], "rejected": [U, BAD],
      "messages": [U, A], "score_chosen": 8.0, "score_rejected": 2.0}, [ASKED], PAIR),
    ("tulu 3 pairs", "preference",
     {"id": "a", "prompt": "And now?", "chosen": [U, A, MORE, LATER], "rejected": [U, A, MORE, BAD],
      "chosen_model": "m", "rejected_model": "n", "source": "s", "chosen_rating": 5.0},
     [ASKED, HEARD, AGAIN], ("Goodbye", "Go away")),
    ("tulu 3 rlvr", "prompts", {"messages": [U], "ground_truth": "4", "dataset": "gsm8k"},
     [ASKED], ()),
    ("openhermes", "sft",
     {"conversations": [{**H, "weight": None}, {**G, "weight": None}], "system_prompt": None,
      "category": "orca", "skip_prompt_formatting": False, "avatarUrl": None, "source": "airoboros",
      "model": "m", "idx": "1", "hash": "2", "views": 3, "language": "English", "topic": "t"},
     [ASKED, SAID], ()),
    ("wildchat", "sft",
     {"conversation_hash": "h", "model": "m", "timestamp": "2023-04-09", "turn": 1, "toxic": False,
      "conversation": [{**U, "country": "US", "hashed_ip": "x", "header": {"a": "b"},
                        "language": "English", "redacted": False, "state": "CA", "toxic": False,
                        "turn_identifier": 1, "timestamp": None}, {**A, "turn_identifier": 1}],
      "openai_moderation": [{"a": 1}], "detoxify_moderation": [{"a": 1}], "redacted": False},
     [ASKED, SAID], ()),
    ("lmsys chat", "sft",
     {"conversation_id": "c", "model": "m", "conversation": [U, A], "turn": 1, "redacted": False,
      "language": "English", "openai_moderation": [{"flagged": False}]}, [ASKED, SAID], ()),
    ("numina", "sft", {"source": "s", "problem": "Hi", "solution": "Hello", "messages": [U, A]},
     [ASKED, SAID], ()),
    ("open-r1 mixture", "sft", {"messages": [U, A], "num_tokens": 5, "source": "s"},
     [ASKED, SAID], ()),
    ("helpsteer", "sft", {"prompt": "Hi", "response": "Hello", "helpfulness": 4, "verbosity": 1},
     [ASKED, SAID], ()),
    ("beavertails", "sft",
     {"prompt": "Hi", "response": "Hello", "category": {"violence": False}, "is_safe": True},
     [ASKED, SAID], ()),
    ("axolotl alpaca, response", "sft", {"instruction": "Hi", "input": "", "response": "Hello"},
     [ASKED, SAID], ()),
    ("no robots", "sft", {"prompt": "Hi", "prompt_id": "a", "messages": [U, A], "category": "Chat"},
     [ASKED, SAID], ()),
    ("dahoas", "preference",
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello", "chosen": " Hello",
      "rejected": " Go away"}, [ASKED], (" Hello", " Go away")),
    # Others
    ("sharegpt keys in messages", "sft", {"messages": [H, G]}, [ASKED, SAID], ()),
    ("openai keys in conversations", "sft", {"conversations": [U, A]}, [ASKED, SAID], ()),
    ("text parts", "sft",
     {"messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]},
     [ASKED, SAID], ()),
    ("weights", "sft", {"messages": [U, {**A, "weight": 0}, MORE, {**LATER, "weight": 1}]},
     [ASKED, HEARD, AGAIN, END], ()),
    ("training flags", "sft",
     {"conversations": [{**H, "train": False}, {**G, "train": "true"}, H, {**G, "train": "0"}]},
     [ASKED, SAID, ASKED, HEARD], ()),
    ("ms-swift loss", "sft", {"messages": [U, {**A, "loss": False}, MORE, {**LATER, "loss": True}]},
     [ASKED, HEARD, AGAIN, END], ()),
    ("torchtune masked", "sft",
     {"messages": [{**U, "masked": True}, {**A, "masked": False}, MORE, {**LATER, "masked": 0}]},
     [ASKED, SAID, AGAIN, END], ()),
    ("torchtune masked reply", "sft",
     {"messages": [U, {**A, "masked": True}, MORE, {**LATER, "masked": False}]},
     [ASKED, HEARD, AGAIN, END], ()),
    ("other names of roles", "sft",
     {"messages": [{"role": "System", "content": "Be kind."}, {**U, "role": "prompter"},
                   {**A, "role": "Chatbot"}, {**MORE, "role": "User"}, {**LATER, "role": "model"}]},
     [KIND, ASKED, SAID, AGAIN, END], ()),
    ("pair of conversations with a system column", "preference",
     {"system": "Be kind.", "chosen": [U, A], "rejected": [U, BAD]}, [KIND, ASKED], PAIR),
    ("pair with system messages", "preference",
     {"prompt": [SYSTEM, U], "chosen": [SYSTEM, U, A], "rejected": [SYSTEM, U, BAD]},
     [KIND, ASKED], PAIR),
    ("label as a number in a text", "unpaired", {"prompt": "Hi", "output": "Hello", "label": "1.0"},
     [ASKED], ("Hello", True)),
    ("pair with system", "preference",
     {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
     [KIND, ASKED], PAIR),
    ("pair that repeats its prompt", "preference",
     {"prompt": "Hi", "messages": [U, A], "chosen": [U, A], "rejected": [U, BAD], "score": 1},
     [ASKED], PAIR),
    ("pair that repeats the chosen one", "preference",
     {"messages": [U, A], "chosen": [U, A], "rejected": [U, BAD]}, [ASKED], PAIR),
    ("transcripts with prompt", "preference",
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}, [ASKED], PAIR),
    ("conversation with its prompt", "sft", {"prompt": "Hi", "messages": [U, A]},
     [ASKED, SAID], ()),
    ("empty system message", "sft", {"messages": [{"role": "system", "content": ""}, U, A]},
     [("system", "", False), ASKED, SAID], ()),
    ("empty system turn", "prompts", {"conversations": [{"from": "system", "value": None}, H]},
     [("system", "", False), ASKED], ()),
    ("nemotron", "sft",
     {"uuid": "u", "license": "l", "generator": "g", "version": "v", "category": "chat",
      "reasoning": "off", "metadata": "{}",
      "messages": [{**U, "tool_calls": []}, {**A, "tool_calls": []}]}, [ASKED, SAID], ()),
    ("nemotron with a system prompt", "sft",
     {"input": [U], "output": "Hello", "category": "math", "reasoning": "on", "generator": "g",
      "used_in_training": "Ultra", "system_prompt": "Be kind."}, [KIND, ASKED, SAID], ()),
    ("log of an api", "sft",
     {"model": "m", "messages": [U, A], "tools": [], "tool_choice": "auto", "temperature": 0.2,
      "max_tokens": 100, "stream": False, "response_format": {"type": "text"}}, [ASKED, SAID], ()),
    ("rendered text beside", "sft",
     {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below: Hi\n### Hello"},
     [ASKED, SAID], ()),
    ("prompts of conversations", "prompts", {"messages": [U, A, MORE, LATER]},
     [ASKED, HEARD, AGAIN], ()),
    ("prompts of sharegpt", "prompts", {"conversations": [H, G, H], "system": "Be kind."},
     [KIND, ASKED, HEARD, ASKED], ()),
    ("prompts of alpaca", "prompts",
     {"instruction": "And now?", "history": [["Hi", "Hello"]], "output": "Goodbye"},
     [ASKED, HEARD, AGAIN], ()),
    ("prompts of labels", "prompts", {"messages": [U, A, MORE, LATER], "label": False},
     [ASKED, HEARD, AGAIN], ()),
    ("chosen reply", "sft", {"prompt": [U, A, MORE], "chosen": "Goodbye", "rejected": "x"},
     [ASKED, HEARD, AGAIN, END], ()),
    ("chosen transcript", "sft",
     {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant: Goodbye",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant: No"},
     [ASKED, HEARD, AGAIN, END], ()),
]  # fmt: skip
