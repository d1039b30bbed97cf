"""What a result of `coverage.py` says: the page of all model types, and what changed since an earlier result.

python benchmarks/coverage_page.py benchmarks/results/coverage.json --page docs/models.md
python benchmarks/coverage_page.py /tmp/new.json --since benchmarks/results/coverage.json
"""

import argparse
import json
import re
from pathlib import Path
from textwrap import shorten

from hf_efficient.models.family import ABILITIES

POPULAR = """
bert roberta camembert xlm_roberta distilbert albert mpnet deberta deberta_v2 electra modernbert nomic_bert esm
t5 mt5 umt5 bart mbart pegasus m2m_100 marian whisper wav2vec2 hubert wavlm clip siglip siglip2 vit deit swin
swinv2 beit dinov2 dinov2_with_registers dinov3_vit convnext segformer detr layoutlm layoutlmv3 blip blip_2
llava llava_next llava_onevision qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_vl qwen2_vl qwen2_5_vl qwen3_5
qwen3_5_moe llama llama4 gemma gemma2 gemma3 gemma3n gemma4 phi phi3 mistral mistral3 ministral ministral3
mixtral gpt_oss deepseek_v2 deepseek_v3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen opt bloom falcon mpt
starcoder2 stablelm olmo olmo2 olmo3 olmoe granite granitemoe granitemoehybrid smollm3 cohere cohere2 glm glm4
glm4_moe timesfm patchtst chronos paligemma idefics3 smolvlm internvl florence2 mllama aria pixtral videomae
timesformer vivit dpt depth_anything sam sam2 owlvit owlv2 grounding_dino rt_detr yolos mask2former oneformer
table_transformer speecht5 seamless_m4t mamba mamba2 jamba zamba2 bamba falcon_h1 nemotron_h lfm2 rwkv xlnet
longformer big_bird led reformer funnel rembert roformer splinter mobilebert squeezebert fnet nystromformer
perceiver xlm trocr nougat donut vision_encoder_decoder encoder_decoder
""".split()  # noqa: SIM905


def changes(old: dict, new: dict) -> list[str]:
    """What types gained and lost from one result to another, one line each; losses first, with the reason.

    Of types that are in one alone it says so, unless the new result is of some types only.
    """
    before, after = ({row["type"]: row for row in result["rows"]} for result in (old, new))
    lost, gained = [], []
    for name in sorted(before.keys() | after.keys()):
        had, has = (_held(rows[name]) if name in rows else set() for rows in (before, after))
        if name not in after:
            lost += [f"gone    {name}: {_listed(had)}"] if len(after) > len(before) / 2 else []
            continue
        why = "; ".join(f"{place}: {shorten(reason, 120)}" for place, reason in after[name]["why"].items())
        if "silent wrong" in why or had - has:
            lost.append(f"lost    {name}: {_listed(had - has)} ({why})")
        if has - had:
            gained.append(f"{'gained ' if name in before else 'new    '} {name}: {_listed(has - had)}")
    return [*lost, *gained]


def _held(row: dict) -> set[str]:
    """The abilities of a type; `whole`: all its stacks are converted; `built`: it could be made small and fed."""
    held = {ability for ability, holds in row["abilities"].items() if holds}
    held |= {"whole"} if "convert" in held and row.get("whole") else set()
    return held | (set() if "model" in row["why"] else {"built"})


def _listed(abilities: set[str]) -> str:
    return ", ".join(one for one in ("built", *ABILITIES, "whole") if one in abilities) or "nothing"


PAGE = """# Model types

What can be done with {types} model types of transformers {transformers}, each tried on a tiny model made by rule from
its default config, or where that makes no model from a small config that runs ({given} types): converted, pruned,
saved, loaded again and compared. {convert} can be converted ({whole} of them whole, the others in some of their
stacks), {units} lose heads or neurons, {layers} lose layers. The numbers of this page are those of
`python benchmarks/coverage.py`; what stands in brackets is the stack that it is said of.

A type that is missing here could not be made small, or fed, by rule: that says nothing of it. Ask the model itself:

```python
from transformers import BertConfig

from hf_efficient.models.anatomy import ConfigAnatomy

for stack in ConfigAnatomy.of_config(BertConfig()).stacks:
    print(stack.name, dict(stack.entry.refusals))  # encoder {{}}: everything can be done
```

| type | converted | heads | neurons | layers | what stands in the way |
|---|---|---|---|---|---|
"""


def write_page(result: dict, path: Path) -> None:
    """docs/models.md: the popular types first, then all others by name."""
    counts = result["counts"]
    rows = {row["type"]: row for row in result["rows"] if "class" in row}
    popular = {name.replace("-", "_"): name for name in rows}
    first = [popular[name] for name in POPULAR if name in popular]
    order = [*first, *sorted(rows.keys() - set(first))]
    text = PAGE.format(
        types=len(rows),
        given=counts["built from given configs"],
        transformers=result["transformers"],
        convert=counts["convert"],
        layers=counts["layers"],
        whole=counts["converted whole"],
        units=counts["heads or neurons"],
    )
    for name in order:
        row = rows[name]
        marks = ["yes" if row["abilities"].get(ability) else "" for ability in ABILITIES]
        if marks[0] and not row.get("whole"):
            marks[0] = "in part"
        text += f"| {name} | {' | '.join(marks)} | {_reasons(row)} |\n"
    path.write_text(text)


def _reasons(row: dict) -> str:
    reasons: dict[str, list[str]] = {}
    for place, reason in row["why"].items():
        stack, _, ability = place.rpartition(".")
        short = re.sub(r"^How models of type .* could not be found out: ", "", reason).split(". ")[0]
        short = re.sub(r"(^|: )\w+Error(: | at ).*", r"\1changed so, a tiny model does not run", short)
        reasons.setdefault(shorten(short, 120, placeholder=" ...").replace("|", "/"), []).append(
            f"{ability} ({stack})" if stack else ability
        )
    for path in row.get("left_out", ()):
        reasons.setdefault("not described", []).append(path)
    return "; ".join(f"{', '.join(places)}: {reason}" for reason, places in reasons.items())


def read(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="what coverage.py wrote")
    parser.add_argument("--page", type=Path, help="write this page of it")
    parser.add_argument("--since", type=Path, help="an earlier result: say what changed since then")
    return parser.parse_args(words)


def main() -> None:
    args = read()
    result = json.loads(args.result.read_text())
    if args.page:
        write_page(result, args.page)
    if args.since:
        earlier = json.loads(args.since.read_text())
        print(f"transformers {earlier['transformers']} -> {result['transformers']}")
        print("\n".join(changes(earlier, result)) or "nothing changed")


if __name__ == "__main__":
    main()
