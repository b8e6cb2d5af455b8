"""The two detectors of the papers, a row each; what differs between them is what the rows say."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One pair of box head and mask head.

    Attributes
    ----------
    iou : float
        From this overlap on a region is an object's.
    std : tuple of 4 float
        What coded boxes are divided by.
    weight : float
        Of its losses.
    """

    iou: float
    std: tuple[float, float, float, float]
    weight: float = 1.0


@dataclass(frozen=True)
class DetectorConfig:
    """Everything but the backbone.

    Attributes
    ----------
    num_classes : int
    stages : tuple of Stage
    convs, fcs : int
        Convolutions with BatchNorm and fully connected layers of a box head.
    giou : float, optional
        Weight of GIoU between decoded boxes; None for L1 between coded ones, with weight 1.
    masks : bool
        A mask head per stage.
    anchors_inside : bool
        Only anchors that lie in the image are trained.
    rpn_beta : float
        Where the smooth L1 loss of the RPN becomes linear; 0 for L1.
    train_proposals, test_proposals : (int, int)
        Per level before NMS, per image behind it.
    channels, fc_channels : int
        Of FPN, RPN and the heads' convolutions; of the fully connected layers.
    rpn_samples, roi_samples : int
        Per image, of which at most a half and a quarter are positive.
    min_score, nms_iou, detections
        What is kept of the predictions of an image.
    """

    num_classes: int
    stages: tuple[Stage, ...]
    convs: int
    fcs: int
    giou: float | None
    masks: bool
    anchors_inside: bool
    rpn_beta: float
    train_proposals: tuple[int, int]
    test_proposals: tuple[int, int] = (1000, 1000)
    channels: int = 256
    fc_channels: int = 1024
    rpn_samples: int = 256
    roi_samples: int = 512
    min_score: float = 0.05
    nms_iou: float = 0.5
    detections: int = 100


# Cascade Mask R-CNN on COCO (SLaK A.3, SW C.3): the published configurations of ConvNeXt.
CASCADE = DetectorConfig(
    num_classes=80,
    stages=(
        Stage(0.5, (0.1, 0.1, 0.2, 0.2)),
        Stage(0.6, (0.05, 0.05, 0.1, 0.1), weight=0.5),
        Stage(0.7, (0.033, 0.033, 0.067, 0.067), weight=0.25),
    ),
    convs=4, fcs=1, giou=10.0, masks=True, anchors_inside=True, rpn_beta=1 / 9, train_proposals=(2000, 2000),
)
# Faster R-CNN on PASCAL VOC 2007 (SLaK A.4); no configuration is published, these are MMDetection's defaults.
FASTER = DetectorConfig(
    num_classes=20, stages=(Stage(0.5, (0.1, 0.1, 0.2, 0.2)),),
    convs=0, fcs=2, giou=None, masks=False, anchors_inside=False, rpn_beta=0.0, train_proposals=(2000, 1000),
)
