p='mini/train_recognizer.py'; s=open(p).read()
s=s.replace("import cheats  # of evaluation/\n","")
s=s.replace('''ALTERED = {**cheats.ALTERED, "scaled": scaled}  # pictures of the same person


''','')
s=s.replace('''    """Measures what is left of FR(source, edit) when the edits are altered in ways that leave the person."""
''','''    """Measures what is left of FR(source, edit) when the edits are altered in ways that leave the person."""
    from cheats import ALTERED, SHIFT  # of evaluation/, which world.py makes known

    alterations = {name: ALTERED[name] for name in ("shifted", "mirrored", "gamma", "saturated", "blurred")}
''')
s=s.replace('''    for name in ("shifted", "mirrored", "gamma", "saturated", "blurred", "scaled"):
        altered = [np.asarray(ALTERED[name](Image.fromarray(picture), cheats.SHIFT)) for picture in pictures]
''','''    for name, alter in {**alterations, "scaled": scaled}.items():
        altered = [np.asarray(alter(Image.fromarray(picture), SHIFT)) for picture in pictures]
''')
open(p,'w').write(s)
