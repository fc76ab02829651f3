"""What the figures were measured on."""

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """The hardware and the versions in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        processor = names[0] if names else processor
    parts = [f'{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads', f'torch {torch.__version__}']
    if device.type == 'cuda':
        parts.insert(0, torch.cuda.get_device_name(device))
    return ', '.join(parts)
