def sub(p,*pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s,(p,a); s=s.replace(a,b)
    open(p,'w').write(s)
sub('mini/train_recognizer.py',
('''depths=[1, 2, 2, 1],
                layer''','''depths=[2, 2, 2, 1],
                layer''') if False else ('''    parser.add_argument("--images"''','''    parser.add_argument("--start_from", type=Path, help="a finished model of this kind, trained further")
    parser.add_argument("--images"'''),
('''def training_requests(''','''@torch.no_grad()
def take_over(model: CosFace, directory: Path, pictures: np.ndarray, found: np.ndarray) -> None:
    """Starts from a finished model, and from what it makes of each identity: the mean of its embeddings.

    pictures: as many of each identity, one after another; found: their faces' boxes.
    """
    finished = load_recognizer(str(directory), torch.device("cpu"), torch.float32)
    model.backbone.load_state_dict(finished.network.state_dict())
    embeddings = embed(finished, pictures, found)
    model.centres.copy_(embeddings.view(len(model.centres), -1, embeddings.shape[1]).mean(1))


def training_requests('''),
('''        images, boxes = world.render(requests), torch.from_numpy(crops.find(requests)).float()
        shown = boxes.any(dim=1).nonzero().flatten()  # the rows that show a face
''','''        images, found = world.render(requests), crops.find(requests)
        boxes = torch.from_numpy(found).float()
        shown = boxes.any(dim=1).nonzero().flatten()  # the rows that show a face
        if args.start_from:
            take_over(model, args.start_from, images, found)
'''))
