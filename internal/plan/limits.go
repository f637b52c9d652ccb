package plan

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// priorities are set while the process can still raise them.
func (b *builder) priorities(p *specs.Process) {
	if v := p.OOMScoreAdj; v != nil {
		if *v < -1000 || *v > 1000 {
			b.fail("oomScoreAdj %d is out of range (-1000 to 1000)", *v)
		}
		b.self("oom_score_adj", "", strconv.Itoa(*v), "set oom_score_adj")
	}
	b.scheduler(p.Scheduler)
	if io := p.IOPriority; io != nil {
		class := map[specs.IOPriorityClass]uint32{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}[io.Class]
		if class == 0 || io.Priority < 0 || io.Priority > 7 {
			b.fail("io priority %.32q %d is unknown", io.Class, io.Priority)
		}
		b.op(OpIOPriority, 0, "set io priority", new(enc).u32(class<<13|uint32(io.Priority)))
	}
}

func (b *builder) scheduler(s *specs.Scheduler) {
	if s == nil {
		return
	}
	policies := map[specs.LinuxSchedulerPolicy]uint32{
		specs.SchedOther: 0, specs.SchedFIFO: 1, specs.SchedRR: 2, specs.SchedBatch: 3, specs.SchedISO: 4, specs.SchedIdle: 5, specs.SchedDeadline: 6,
	}
	flagBits := map[specs.LinuxSchedulerFlag]uint64{
		specs.SchedFlagResetOnFork: 1, specs.SchedFlagReclaim: 2, specs.SchedFlagDLOverrun: 4, specs.SchedFlagKeepPolicy: 8,
		specs.SchedFlagKeepParams: 16, specs.SchedFlagUtilClampMin: 32, specs.SchedFlagUtilClampMax: 64,
	}
	policy, ok := policies[s.Policy]
	if !ok || s.Nice < -20 || s.Nice > 19 {
		b.fail("scheduler policy %.32q or nice value %d is unknown", s.Policy, s.Nice)
	}
	if s.Priority != 0 && policy != 1 && policy != 2 {
		b.fail("scheduler priority %d needs SCHED_FIFO or SCHED_RR", s.Priority)
	}
	if policy != 6 && s.Runtime|s.Deadline|s.Period != 0 {
		b.fail("scheduler runtime, deadline and period need SCHED_DEADLINE")
	}
	var flags uint64
	for _, f := range s.Flags {
		bit, ok := flagBits[f]
		if !ok {
			b.fail("scheduler flag %.32q is unknown", f)
		}
		flags |= bit
	}
	b.op(OpScheduler, 0, "set scheduler", new(enc).u32(policy).u64(flags).u32(uint32(s.Nice)).u32(uint32(s.Priority)).
		u64(s.Runtime).u64(s.Deadline).u64(s.Period))
}

// raiseLimits sets limits while the capability to raise them is there; what
// would bind the stage itself follows later, being lower.
func (b *builder) raiseLimits(p *specs.Process) {
	var early []specs.POSIXRlimit
	for _, l := range p.Rlimits {
		if l.Type == "RLIMIT_NOFILE" {
			if l.Hard < 1024 {
				continue
			}
			l.Soft = l.Hard
		}
		early = append(early, l)
	}
	b.rlimits(early)
}

func (b *builder) rlimits(list []specs.POSIXRlimit) {
	if len(list) == 0 {
		return
	}
	numbers := map[string]uint32{
		"RLIMIT_CPU": 0, "RLIMIT_FSIZE": 1, "RLIMIT_DATA": 2, "RLIMIT_STACK": 3, "RLIMIT_CORE": 4, "RLIMIT_RSS": 5,
		"RLIMIT_NPROC": 6, "RLIMIT_NOFILE": 7, "RLIMIT_MEMLOCK": 8, "RLIMIT_AS": 9, "RLIMIT_LOCKS": 10, "RLIMIT_SIGPENDING": 11,
		"RLIMIT_MSGQUEUE": 12, "RLIMIT_NICE": 13, "RLIMIT_RTPRIO": 14, "RLIMIT_RTTIME": 15,
	}
	seen := map[uint32]bool{}
	e := new(enc).count(len(list))
	for _, l := range list {
		n, ok := numbers[l.Type]
		if !ok || seen[n] {
			b.fail("resource limit %.32q is unknown or given twice", l.Type)
		}
		if l.Soft > l.Hard {
			b.fail("soft limit %d of %s exceeds the hard limit %d", l.Soft, l.Type, l.Hard)
		}
		seen[n] = true
		e.u32(n).u64(l.Soft).u64(l.Hard)
	}
	b.op(OpRlimits, 0, "set resource limits", e)
}

func (b *builder) personality(spec *specs.Spec) {
	p := spec.Linux.Personality
	if p == nil {
		return
	}
	domains := map[specs.LinuxPersonalityDomain]uint32{specs.PerLinux: 0, specs.PerLinux32: 8}
	d, ok := domains[p.Domain]
	if !ok || len(p.Flags) != 0 {
		b.fail("personality %.32q or its flags are unknown", p.Domain)
	}
	b.op(OpPersonality, 0, "set personality", new(enc).u32(d))
}

func (b *builder) affinity(list string) {
	if list == "" {
		return
	}
	mask, err := bitmap(list, 8192)
	if err != nil {
		b.fail("malformed CPU list %.64q", list)
		return
	}
	b.op(OpAffinity, 0, "set CPU affinity", new(enc).bytes(mask))
}

func (b *builder) allCPUs() {
	b.op(OpAffinity, FlagOptional, "run on all CPUs", new(enc).bytes(bytes.Repeat([]byte{0xff}, 1024)))
}

// CPUMask gives the first 64 bits of a CPU list, 0 for a malformed one.
func CPUMask(list string) uint64 {
	mask, err := bitmap(list, 8192)
	if err != nil || len(mask) < 8 {
		return 0
	}
	return binary.LittleEndian.Uint64(mask)
}

func (b *builder) memoryPolicy(spec *specs.Spec) {
	m := spec.Linux.MemoryPolicy
	if m == nil {
		return
	}
	mode, ok := policyModes[m.Mode]
	if !ok {
		b.fail("invalid memory policy mode %.32q", m.Mode)
	}
	for _, f := range m.Flags {
		bit, ok := policyFlags[f]
		if !ok {
			b.fail("invalid memory policy flag %.32q", f)
		}
		mode |= bit
	}
	var nodes []byte
	if m.Nodes != "" {
		var err error
		if nodes, err = bitmap(m.Nodes, 1024); err != nil {
			b.fail("invalid memory policy node list %.64q", m.Nodes)
		}
	}
	count := 0
	for _, w := range nodes {
		count += bits.OnesCount8(w)
	}
	switch m.Mode {
	case specs.MpolDefault, specs.MpolLocal:
		if count != 0 {
			b.fail("memory policy mode requires 0 nodes but got %d", count)
		}
	case specs.MpolPreferred:
	default:
		if count == 0 {
			b.fail("memory policy mode requires at least one node but got 0")
		}
	}
	b.op(OpMemPolicy, 0, "set memory policy", new(enc).u32(mode).bytes(nodes))
}

// bitmap turns a list such as "0-3,7" into bits, in words of 8 bytes.
func bitmap(list string, limit uint64) ([]byte, error) {
	var words []uint64
	for _, part := range strings.Split(list, ",") {
		lo, hi, ranged := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(lo, 10, 32)
		z := a
		if err == nil && ranged {
			z, err = strconv.ParseUint(hi, 10, 32)
		}
		if err != nil || a > z || z >= limit {
			return nil, fault.New(fault.Invalid, "malformed list")
		}
		for ; a <= z; a++ {
			for uint64(len(words)) <= a/64 {
				words = append(words, 0)
			}
			words[a/64] |= 1 << (a % 64)
		}
	}
	var out []byte
	for _, w := range words {
		out = binary.LittleEndian.AppendUint64(out, w)
	}
	return out, nil
}
