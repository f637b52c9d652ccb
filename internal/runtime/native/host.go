package native

import (
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostLimits is what this process may pass on.
type hostLimits struct {
	userNS      bool // this process is not in the first user namespace
	keepGroups  bool // setgroups is denied there
	uids, gids  []idSpan
	sysResource bool // CAP_SYS_RESOURCE: raise hard limits, lower oom scores
	bounding    uint64
	oomScore    int
	rlimits     map[string]uint64 // hard limits
	appArmor    bool
	seLinux     bool
}

const capSysResource = 24

// idSpan is a run of ids that exist in a user namespace.
type idSpan struct{ first, size uint64 }

func readIDs(path string) (out []idSpan) {
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(f[0], 10, 32)
		size, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 == nil && err2 == nil {
			out = append(out, idSpan{first, size})
		}
	}
	return out
}

func hasID(l []idSpan, id uint32) bool {
	return slices.ContainsFunc(l, func(s idSpan) bool { return uint64(id) >= s.first && uint64(id)-s.first < s.size })
}

// permits refuses a process whose ids the engine's own user namespace lacks, and
// leaves out supplementary groups that it lacks.
func (h *hostLimits) permits(p *specs.Process) (*specs.Process, error) {
	if !h.userNS {
		return p, nil
	}
	if !hasID(h.uids, p.User.UID) || !hasID(h.gids, p.User.GID) {
		return nil, fault.New(fault.Unsupported, "cannot run as user %d, group %d: the engine's user namespace does not map them; give its user more ids in /etc/subuid and /etc/subgid, then shut the engine down and start it again", p.User.UID, p.User.GID)
	}
	if !slices.ContainsFunc(p.User.AdditionalGids, func(g uint32) bool { return !hasID(h.gids, g) }) {
		return p, nil
	}
	c := *p
	c.User.AdditionalGids = slices.DeleteFunc(slices.Clone(p.User.AdditionalGids), func(g uint32) bool { return !hasID(h.gids, g) })
	return &c, nil
}

func rlimitNames() map[string]int {
	return map[string]int{
		"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
		"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
		"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
		"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
		"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
	}
}

func readHostLimits() hostLimits {
	h := hostLimits{rlimits: map[string]uint64{}}
	b, err := os.ReadFile("/proc/self/uid_map")
	h.userNS = err == nil && !slices.Equal(strings.Fields(string(b)), []string{"0", "0", "4294967295"})
	if h.userNS {
		h.uids, h.gids = readIDs("/proc/self/uid_map"), readIDs("/proc/self/gid_map")
		b, _ = os.ReadFile("/proc/self/setgroups")
		h.keepGroups = strings.TrimSpace(string(b)) == "deny"
	}
	b, _ = os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		if err != nil {
			continue
		}
		switch k {
		case "CapEff":
			// The kernel wants it in the first user namespace.
			h.sysResource = !h.userNS && n&(1<<capSysResource) != 0
		case "CapBnd":
			h.bounding = n
		}
	}
	for name, r := range rlimitNames() {
		var l unix.Rlimit
		if unix.Getrlimit(r, &l) == nil {
			h.rlimits[name] = l.Max
		}
	}
	b, _ = os.ReadFile("/proc/self/oom_score_adj")
	h.oomScore, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	b, _ = os.ReadFile("/sys/module/apparmor/parameters/enabled")
	h.appArmor = strings.HasPrefix(string(b), "Y")
	h.seLinux = exists("/sys/fs/selinux/enforce")
	return h
}

// clamp lowers what the host does not permit to the nearest that it does and
// says so. The spec given is not changed.
func (h *hostLimits) clamp(spec *specs.Spec) (*specs.Spec, []string) {
	p, warnings := h.clampProc(spec.Process)
	if p == spec.Process {
		return spec, warnings
	}
	c := *spec
	c.Process = p
	return &c, warnings
}

func (h *hostLimits) clampProcess(p *specs.Process) *specs.Process {
	p, _ = h.clampProc(p)
	return p
}

func (h *hostLimits) clampProc(p *specs.Process) (*specs.Process, []string) {
	var warnings []string
	c := *p
	changed := false
	if !h.sysResource {
		for i, l := range p.Rlimits {
			hard, known := h.rlimits[l.Type]
			if !known || l.Hard <= hard {
				continue
			}
			if !changed || &c.Rlimits[0] == &p.Rlimits[0] {
				c.Rlimits = slices.Clone(p.Rlimits)
			}
			c.Rlimits[i].Hard, c.Rlimits[i].Soft = hard, min(l.Soft, hard)
			changed = true
			warnings = append(warnings, fmt.Sprintf("%s is lowered from %d to %d: raising it takes CAP_SYS_RESOURCE, which the engine lacks", l.Type, l.Hard, hard))
		}
		if p.OOMScoreAdj != nil && *p.OOMScoreAdj < h.oomScore {
			n := h.oomScore
			warnings = append(warnings, fmt.Sprintf("the oom score is %d instead of %d: lowering it takes CAP_SYS_RESOURCE, which the engine lacks", n, *p.OOMScoreAdj))
			c.OOMScoreAdj = &n
			changed = true
		}
	}
	if p.Capabilities != nil {
		caps := *p.Capabilities
		lost := map[string]bool{}
		for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted, &caps.Inheritable, &caps.Ambient} {
			kept := make([]string, 0, len(*set))
			for _, name := range *set {
				if n, ok := capNumber(name); ok && h.bounding&(1<<n) == 0 {
					lost[name] = true
					continue
				}
				kept = append(kept, name)
			}
			*set = kept
		}
		if len(lost) > 0 {
			names := make([]string, 0, len(lost))
			for n := range lost {
				names = append(names, n)
			}
			slices.Sort(names)
			warnings = append(warnings, "the engine itself lacks "+strings.Join(names, ", ")+", so the container does too")
			c.Capabilities = &caps
			changed = true
		}
	}
	if !changed {
		return p, warnings
	}
	return &c, warnings
}

func capNumber(name string) (uint, bool) {
	m, err := plan.CapabilityMask([]string{name})
	return uint(bits.TrailingZeros64(m)), err == nil
}
