def sub(p,*pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a); s=s.replace(a,b)
    open(p,'w').write(s)
sub('models/faces.py',('''# Each look is given the pictures in which those before found no face. In colour alone MTCNN misses most blue and
# green faces, which the paper's edits make, and by its pyramid's steps some of a picture of 128 px.
''','''# Each look is given the pictures in which those before found no face. In colour alone MTCNN misses most blue
# and green faces, which the paper's edits make, and by its pyramid's steps some of a picture of 128 px.
'''))
sub('docs/evaluation.md',(" In the mini set a face's box is the whole image: nothing is aligned.",""))
sub('docs/extending.md',("The face's box comes from MTCNN (margin 0); in the mini set it is the whole image.","The face's box comes from MTCNN (margin 0)."))
