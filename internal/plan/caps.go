package plan

import (
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// capabilityNames are in the kernel's order.
var capabilityNames = strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE
AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

// CapabilityMask turns names ("CAP_CHOWN") into a bit mask.
func CapabilityMask(names []string) (uint64, error) {
	var m uint64
next:
	for _, n := range names {
		for i, c := range capabilityNames {
			if n == "CAP_"+c {
				m |= 1 << i
				continue next
			}
		}
		return 0, fault.New(fault.Invalid, "capability %.32q is unknown", n)
	}
	return m, nil
}
