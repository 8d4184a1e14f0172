def sub(p,*pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a); s=s.replace(a,b)
    open(p,'w').write(s)
sub('mini/train_recognizer.py',('''    `identified`: the share of the edits whose most similar source, of all people's, is their own.
    """
    count = len(identities)
    plain = [(i, v, None) for i in identities for v in range(PLAIN)]
    edited = edits_of(identities)
    a = embed(recognizer, world.render(plain), crops.find(plain))  # (count * PLAIN, D)
    b = embed(recognizer, world.render(edited), found_or_source(edited))  # (count * EDITED, D)
    who_a = torch.arange(count).repeat_interleave(PLAIN)
    who_b = torch.arange(count).repeat_interleave(EDITED)
    variation = torch.arange(PLAIN).repeat(count)
''','''    `identified`: the share of the edits whose most similar source, of all people's, is their own. As for FR,
    plain pictures without a face that MTCNN finds are left out, and edits are then cut as their sources are.
    """
    count = len(identities)
    plain = [(i, v, None) for i in identities for v in range(PLAIN)]
    edited = edits_of(identities)
    found_a, found_b = crops.find(plain), found_or_source(edited)
    shown_a, shown_b = found_a.any(axis=1), found_b.any(axis=1)
    a = embed(recognizer, world.render(plain)[shown_a], found_a[shown_a])  # (about count * PLAIN, D)
    b = embed(recognizer, world.render(edited)[shown_b], found_b[shown_b])  # (about count * EDITED, D)
    who_a = torch.arange(count).repeat_interleave(PLAIN)[shown_a]
    who_b = torch.arange(count).repeat_interleave(EDITED)[shown_b]
    variation = torch.arange(PLAIN).repeat(count)[shown_a]
'''),
('''    to_sources = across[:, variation == 0]  # (count * EDITED, count)
    own = to_sources[torch.arange(len(b)), who_b]  # FR(source, its edit)
''','''    to_sources = across[:, variation == 0]  # (edits, sources)
    own = to_sources[who_b[:, None] == who_a[variation == 0]]  # FR(source, its edit)
'''),
('''        "identified": float((to_sources.argmax(1) == who_b).float().mean()),
''','''        "identified": float((who_a[variation == 0][to_sources.argmax(1)] == who_b).float().mean()),
'''),
('''        f"{edited_eer:.2%} one edited (4 %); identified by an edit''','''        f"{edited_eer:.2%} one edited (4 %), {np.mean(~shown_a):.1%} of plain pictures without a face; "
        f"identified by an edit'''),
('''    sources = [(identity, variation, None) for identity, variation, _ in edited]
    reference = embed(recognizer, world.render(sources), crops.find(sources))

    def similarity(altered: np.ndarray, found: np.ndarray | None = None) -> float:
        seen = embed(recognizer, altered, found_or_source(edited, found))
        return float((seen * reference).sum(1).mean())
''','''    sources = [(identity, variation, None) for identity, variation, _ in edited]
    boxes = crops.find(sources)
    shown = boxes.any(axis=1)
    reference = embed(recognizer, world.render(sources)[shown], boxes[shown])

    def similarity(altered: np.ndarray, found: np.ndarray | None = None) -> float:
        seen = embed(recognizer, altered[shown], found_or_source(edited, found)[shown])
        return float((seen * reference).sum(1).mean())
'''))
s=open('mini/train_recognizer.py').read()
i=s.index('    say(\n        f"{count} identities'); print(s[i:i+900])
