"""What `nvidia-smi -q -x` prints, for tests on machines without one."""

from pathlib import Path

# Of an H100, cut to a part; the driver prints about 400 lines a GPU.
GPU = """
  <gpu id="00000000:1B:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <persistence_mode>Enabled</persistence_mode>
    <mig_mode><current_mig>Disabled</current_mig></mig_mode>
    <uuid>GPU-{index}a8f3c14-0000-4000-8000-{index:012d}</uuid>
    <gpu_recovery_action>None</gpu_recovery_action>
    <clocks_event_reasons>
      <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
      <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
      <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
      <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
    </clocks_event_reasons>
    <fb_memory_usage>
      <total>81559 MiB</total><reserved>325 MiB</reserved><used>1 MiB</used>
    </fb_memory_usage>
    <ecc_errors>
      <volatile>
        <sram_correctable>12</sram_correctable>
        <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
        <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
        <dram_correctable>4</dram_correctable>
        <dram_uncorrectable>0</dram_uncorrectable>
      </volatile>
      <aggregate><dram_uncorrectable>3</dram_uncorrectable></aggregate>
    </ecc_errors>
    <remapped_rows>
      <remapped_row_corr>0</remapped_row_corr>
      <remapped_row_pending>No</remapped_row_pending>
      <remapped_row_failure>No</remapped_row_failure>
    </remapped_rows>
    <fabric><state>Completed</state><status>Success</status></fabric>
  </gpu>"""


def smi(count: int = 2, driver: str = "570.124.06", **replaced: str) -> str:
    """What `nvidia-smi -q -x` prints of GPUs; `replaced`: elements of the first one."""
    first = GPU.format(index=0)
    for name, text in replaced.items():
        start = first.index(f"<{name}>") + len(f"<{name}>")
        first = first[:start] + text + first[first.index(f"</{name}>") :]
    rest = [GPU.format(index=index) for index in range(1, count)]
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n'
        f"<nvidia_smi_log><driver_version>{driver}</driver_version>{first}{''.join(rest)}"
        "</nvidia_smi_log>"
    )


def write_nvidia_smi(path: Path, prints: str, code: int = 0) -> None:
    """Make an executable that prints this when asked for all there is, as XML.

    Args:
        prints: in which it puts the values of variables such as $SLURMD_NODENAME.
    """
    path.write_text(
        f'#!/bin/bash\n[ "$*" = "-q -x" ] || exit 9\ncat <<END\n{prints}\nEND\nexit {code}\n'
    )
    path.chmod(0o755)
