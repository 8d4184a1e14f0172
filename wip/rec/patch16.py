def sub(p,*pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a); s=s.replace(a,b)
    open(p,'w').write(s)
sub('mini/train_recognizer.py',('''    shown_a, shown_b = found_a.any(axis=1), found_b.any(axis=1)
''','''    shown_a = found_a.any(axis=1)
    shown_b = np.repeat(shown_a[::PLAIN], EDITED)  # an edit of a source that shows a face
'''),('''        f"{edited_eer:.2%} one edited (4 %), {np.mean(~shown_a):.1%} of plain pictures without a face; "
        f"identified by an edit {result['identified']:.1%} (95 %); "
        f"threshold at {FALSE_ACCEPTS:.1%} false accepts {threshold:.3f}, recognised by an edit "
        f"{result['recognised']:.1%}; mean cosine of different people {result['cosine_different']:.3f}, "
        f"of one person's pictures {result['cosine_same']:.3f}, of an edit and its source "
        f"{result['fr_edit']:.3f} (0.75)"
''','''        f"{edited_eer:.2%} one edited (4 %), without a face {np.mean(~shown_a):.1%} of plain pictures; of the "
        f"edits {result['identified']:.1%} are identified (95 %), {result['recognised']:.1%} above the cosine of "
        f"{FALSE_ACCEPTS:.1%} false accepts, {threshold:.3f}; mean cosine of different people "
        f"{result['cosine_different']:.3f}, of one person's pictures {result['cosine_same']:.3f}, of an edit and "
        f"its source {result['fr_edit']:.3f} (0.75)"
'''))
