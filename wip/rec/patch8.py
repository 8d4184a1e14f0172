p='mini/train_recognizer.py'; s=open(p).read()
s=s.replace('''    from cheats import ALTERED, SHIFT  # of evaluation/, which world.py makes known

''','')
s=s.replace("from PIL import Image\nfrom torch","from cheats import ALTERED, SHIFT  # of evaluation/\nfrom PIL import Image\nfrom torch")
open(p,'w').write(s)
