p='mini/check.py'; s=open(p).read()
s=s.replace("import numpy as np\nimport portraits\n","import crops\nimport numpy as np\nimport portraits\n")
s=s.replace("import train_vae\nimport world\n","import train_vae\nimport world\nfrom pairing import Key  # of evaluation/\nfrom views import FaceView\n")
s=s.replace("from models.faces import face_similarity_to, load_recognizer\n","from models.faces import load_recognizer\n")
s=s.replace('''PEOPLE_OF_VAE, PEOPLE_OF_CLIP, PEOPLE_OF_RECOGNISERS = 50, 100, 200
''','''PEOPLE_OF_VAE, PEOPLE_OF_CLIP, PEOPLE_OF_RECOGNISERS, PEOPLE_ALTERED = 50, 100, 200, 60
''')
s=s.replace('''RECOGNISERS = ("recognizer", "judge")
''','''RECOGNISERS = ("recognizer", "judge")
LEFT = {"shifted": 0.95, "mirrored": 0.9, "gamma": 0.9, "saturated": 0.9, "blurred": 0.85, "scaled": 0.95}
''')
a=s.index("    @torch.no_grad()\n    def similarity"); b=s.index("def check_vae")
s=s[:a]+'''    def similarity(self, edits: np.ndarray, sources: np.ndarray) -> dict[str, np.ndarray]:
        """Measures FR of edits (N, P, H, W, 3) to the sources (N, H, W, 3), by each -> (N, P)."""
        view = FaceView(self.recognizers, crops.detector(), CPU)
        values: dict[str, list[np.ndarray]] = {name: [] for name in RECOGNISERS}
        for number, (images, source) in enumerate(zip(edits, sources, strict=True)):
            view.add_source(str(number), source)
            seen = view(images, [Key(0, prompt, str(number)) for prompt in range(len(images))])
            for name in RECOGNISERS:
                values[name].append((seen[f"{name}_edits"] * seen[f"{name}_sources"]).sum(dim=1).numpy())
        return {name: np.stack(of_people) for name, of_people in values.items()}


'''+s[b:]
s=s.replace('''    for name in RECOGNISERS:
        values = loaded.similarity(name, found.edits, found.sources)
        by_prompt = values.mean(axis=0)
        lowest = int(by_prompt.argmin())
        of_truth = loaded.similarity(name, found.truth, found.sources).mean()
        table.row(
            f"... FR(source, edit) by the {name}",
            f"{values.mean():.3f} (lowest: {edit_prompts[lowest]!r}, {by_prompt[lowest]:.2f}; "
            f"the generator's own edits {of_truth:.3f})",
            ">= 0.75",
            bool(values.mean() >= 0.75),
        )
''','''    similarity, of_truth = (loaded.similarity(edits, found.sources) for edits in (found.edits, found.truth))
    for name, values in similarity.items():
        mean, by_prompt = np.nanmean(values), np.nanmean(values, axis=0)
        lowest = int(by_prompt.argmin())
        table.row(
            f"... FR(source, edit) by the {name}",
            f"{mean:.3f} (lowest: {edit_prompts[lowest]!r}, {by_prompt[lowest]:.2f}; "
            f"the generator's own edits {np.nanmean(of_truth[name]):.3f})",
            ">= 0.75",
            bool(mean >= 0.75),
        )
''')
a=s.index("def check_recognisers"); b=s.index("def check_clip")
s=s[:a]+'''def check_recognisers(table: Table, people: range, loaded: Models) -> None:
    """Measures how well recogniser and judge tell people apart, and how little else sways the judge."""
    for name in RECOGNISERS:
        found = train_recognizer.evaluate(
            loaded.recognizers[name], people[:PEOPLE_OF_RECOGNISERS], print_nothing
        )
        what = f"{name}, {PEOPLE_OF_RECOGNISERS} people"
        plain, edited, identified = found["eer_plain"], found["eer_edited"], found["identified"]
        table.row(f"{what}: equal error rate", f"{plain:.2%}", "<= 1 %", plain <= 0.01)
        table.row("... with one of the two edited", f"{edited:.2%}", "<= 4 %", edited <= 0.04)
        table.row(
            "... identified by the generator's edits among the sources",
            f"{identified:.1%}",
            ">= 95 %",
            identified >= 0.95,
        )
        stated = loaded.recognizers[name].threshold
        table.row(
            "... cosine at 0.1 % false accepts (stated beside the weights)",
            f"{found['threshold']:.3f} ({'not' if stated is None else f'{stated:.3f}'})",
        )
        table.row(
            "... mean cosine of different people (of one person's pictures)",
            f"{found['cosine_different']:.3f} ({found['cosine_same']:.3f})",
        )
    left = train_recognizer.evaluate_altered(loaded.recognizers["judge"], people[:PEOPLE_ALTERED], print_nothing)
    for name, share in left.items():
        table.row(
            f"judge's FR of the generator's edits {name}, {PEOPLE_ALTERED} people",
            f"{share:.3f} x of unaltered",
            f">= {LEFT[name]} x",
            share >= LEFT[name],
        )


'''+s[b:]
s=s.replace('''    unprotected = {name: loaded.similarity(name, clean, sources).mean() for name in RECOGNISERS}
''','''    unprotected = {name: np.nanmean(fr) for name, fr in loaded.similarity(clean, sources).items()}
''')
s=s.replace('''        for name in RECOGNISERS:
            value = loaded.similarity(name, edits, sources).mean()
            share''','''        for name, values in loaded.similarity(edits, sources).items():
            value = np.nanmean(values)
            share''')
s=s.replace('''    box = [[(0, 0, sources.shape[2], sources.shape[1])]]
    files''','''    files''').replace('''        images = protector.protect(to_tensor(source), box, seeds)
''','''        boxes = crops.boxes_of(crops.largest([source]))
        images = protector.protect(to_tensor(source), boxes, seeds)
''')
open(p,'w').write(s)
