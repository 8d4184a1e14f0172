def sub(p,*pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a); s=s.replace(a,b)
    open(p,'w').write(s)
sub('mini/train_recognizer.py',('''        f"{edited_eer:.2%} one edited (4 %), without a face {np.mean(~shown_a):.1%} of plain pictures; of the "
        f"edits {result['identified']:.1%} are identified (95 %), {result['recognised']:.1%} above the cosine of "
        f"{FALSE_ACCEPTS:.1%} false accepts, {threshold:.3f}; mean cosine of different people "
        f"{result['cosine_different']:.3f}, of one person's pictures {result['cosine_same']:.3f}, of an edit and "
        f"its source {result['fr_edit']:.3f} (0.75)"
''','''        f"{edited_eer:.2%} one edited (4 %), no face in {np.mean(~shown_a):.1%} of plain pictures; of the edits "
        f"{result['identified']:.1%} identified (95 %), {result['recognised']:.1%} above the cosine of "
        f"{FALSE_ACCEPTS:.1%} false accepts, {threshold:.3f}; mean cosine of different people "
        f"{result['cosine_different']:.3f}, of one person's pictures {result['cosine_same']:.3f}, "
        f"of an edit and its source {result['fr_edit']:.3f} (0.75)"
'''))
