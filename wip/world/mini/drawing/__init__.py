"""The parts of a synthetic portrait, a file each; portraits.py puts them together. From below: `colours`,
`choices` (what there is to choose from), `people` (the numbers of a person and of a picture), `svg` (the
pen), `scene` (one picture's state), then what is drawn: `places`, `body`, `head`, `face`, `hair`, `extras`.
Nothing imports upwards."""
