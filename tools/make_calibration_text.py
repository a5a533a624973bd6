"""Make exporter/calibration.txt: text that the sample model writes itself, so that the product brings its own.

    python tools/make_calibration_text.py sample --out exporter/calibration.txt    (a GPU: a minute)

Sampled from the model's whole distribution (temperature 1, so it wanders: calibration wants variety, not sense), from
the start of many subjects: half plain prose, a quarter each encyclopaedia entries and conversations. What it costs
against a corpus is in docs/method.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from specquant.exporter.sources import load_model, resolve

SUBJECTS = """a river delta|the printing press|volcanoes|a football club|the human heart|a medieval castle|bread|jazz
the Roman army|photosynthesis|a railway line|chess|an orchestra|coral reefs|a small village in the mountains|whales
the steam engine|a novel about the sea|tax law|a television series|bridges|penguins|the French Revolution|glaciers
a computer program|the violin|a hurricane|democracy|a warship of the First World War|honey bees|the moon|a saint
an election|a museum of modern art|wheat farming|a video game|antibiotics|a desert|the telephone|a famous trial
an opera singer|earthquakes|a species of frog|the silk trade|a university|insurance|a comet|a rock band|vaccines
a cricket match|the alphabet|a lighthouse|cheese|electric cars|a battle in the eighteenth century|memory|rice|clocks
a poem|a chemical element|forests in winter|an airport|prime numbers|a painter of landscapes|sleep|the stock market
a queen|a mountain road|radio astronomy|a children's story|the kidneys|an island in the Pacific|steel|a cathedral
a baseball season|a spy|fungi|the history of money|an engineer|storms at sea|a temple|grammar|a horse race|batteries
a film director|the immune system|canals|an actor on the stage|a city under siege|friendship|tea|a murder mystery|maps
a submarine|a dictionary|gravity|a strike of factory workers|owls|a treaty between two kingdoms|the theory of evolution
a symphony|a law firm|an ancient port|programming in Python|a recipe for soup|a letter to a friend|the weather tomorrow
a school for girls|how to repair a bicycle|a speech to parliament|the price of oil|a wedding|planets of other stars"""

PROSE = ("The history of {s}", "There are many things to say about {s}.", "It was the story of {s} that", "In the year")

# Lines that are dropped: addresses that might be somebody's, and obscenities.
UNWANTED = re.compile(r"https?:|www\.|\S@\S|\b(fuck|shit|cunt|slut|whore|rape|porn|nigg|fagg)", re.IGNORECASE)


def starts(tokenizer: object) -> list[str]:
    subjects = [s for line in SUBJECTS.splitlines() for s in line.split("|")]
    out = []
    for i, s in enumerate(subjects):
        out += [PROSE[i % len(PROSE)].format(s=s), PROSE[(i + 1) % len(PROSE)].format(s=s)]
        out.append(f"= {s.removeprefix('a ').removeprefix('an ').removeprefix('the ').capitalize()} =\n\n")
        chat = [{"role": "user", "content": f"Write three detailed paragraphs about {s}."}]
        out.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))  # type: ignore[attr-defined]
    return out


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=300, help="new tokens a text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(resolve(args.source))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    prompts, texts = starts(tokenizer), []
    for i in range(0, len(prompts), 128):
        batch = tokenizer(prompts[i : i + 128], return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        out = model.generate(**batch, max_new_tokens=args.tokens, do_sample=True, temperature=1.0, top_k=0)
        new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        plain = [p if "<|" not in p else "" for p in prompts[i : i + 128]]
        texts += [(p + n).strip() for p, n in zip(plain, new, strict=True)]
        print(f"{len(texts)} of {len(prompts)}", flush=True)
    lines = "\n\n".join(texts).split("\n")
    args.out.write_text("\n".join(x for x in lines if not UNWANTED.search(x)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
