"""Fine-tunes on ADE20K, COCO, PASCAL VOC and nuScenes: pyramid, heads, datasets, evaluators."""
