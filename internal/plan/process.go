package plan

import (
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Exec is the plan of another process in a running container. Slot 0 is the
// container's init (SlotPidfd), with whose namespaces the child joins all at
// once; only the pid namespace must have been entered by whoever clones it. On
// cgroup v1 the tasks files follow; on v2 the child is born in its cgroup.
func Exec(process *specs.Process, o Options) (*Plan, error) {
	if process == nil {
		return nil, fault.New(fault.Invalid, "cannot compile an exec: there is no process")
	}
	b := &builder{}
	b.namespaces = map[specs.LinuxNamespaceType]string{}
	init := b.slot(Slot{Kind: SlotPidfd})
	if a := process.ExecCPUAffinity; a != nil {
		b.affinity(a.Initial)
	}
	b.enterCgroups(o)
	if a := process.ExecCPUAffinity; a != nil {
		b.affinity(a.Final)
	} else if o.AllCPUs {
		b.allCPUs()
	}
	// Labels and limits take the host's own /proc and capabilities.
	b.priorities(process)
	if o.UserNS {
		b.raiseLimits(process)
	}
	b.label(process, o)
	ns := uint64(unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP)
	if o.Namespaces != 0 {
		ns = o.Namespaces
	}
	if o.UserNS {
		if !o.Unprivileged {
			ns |= unix.CLONE_NEWUSER
		} else {
			ns &^= unix.CLONE_NEWUSER // whoever clones has had to enter it first
		}
		b.namespaces[specs.UserNamespace] = "joined"
	}
	if !o.Joined && ns != 0 {
		b.setns(init, ns, "container's namespaces")
	}
	if o.UserNS {
		b.becomeRoot()
	}
	b.process(&specs.Spec{Process: process, Linux: &specs.Linux{Personality: o.Personality, MemoryPolicy: o.MemoryPolicy}}, o, true)
	return b.finish()
}

// Hooks is a plan that runs the hooks one after another inside the container,
// with state (OCI state JSON) on their standard input.
func Hooks(hooks []specs.Hook, state []byte) (*Plan, error) {
	b := &builder{p: Plan{Continues: true}}
	b.hooks(hooks, state, 0)
	return b.finish()
}

func (b *builder) hooks(hooks []specs.Hook, state []byte, flags uint16) {
	for _, h := range hooks {
		if !path.IsAbs(h.Path) {
			b.fail("path %.128q of a hook is not absolute", h.Path)
		}
		timeout := 0
		if h.Timeout != nil {
			if timeout = *h.Timeout; timeout <= 0 || timeout > 1<<20 {
				b.fail("timeout %d of hook %.128q is out of range", timeout, h.Path)
			}
		}
		args := h.Args
		if len(args) == 0 {
			args = []string{h.Path}
		}
		b.op(OpHook, flags, "run hook "+h.Path, new(enc).str(h.Path).u32(uint32(timeout)).longs(args).longs(h.Env).bytes(state))
	}
}

// process is what comes after the root was entered, in the order in which
// privileges are still there for it.
func (b *builder) process(spec *specs.Spec, o Options, exec bool) {
	p := spec.Process
	b.keepGroups = b.keepGroups || o.KeepGroups
	if o.ID != "" && len(o.ID) <= 128 {
		b.op(OpKeyring, 0, "join session keyring", new(enc).str("_ses."+o.ID))
	}
	if !exec {
		b.label(p, o)
		b.sysctls(spec)
		b.protect(spec)
	}
	b.memoryPolicy(spec)
	b.personality(spec)
	if p.Terminal {
		var w, h uint
		if c := p.ConsoleSize; c != nil {
			w, h = min(c.Width, math.MaxUint16), min(c.Height, math.MaxUint16)
		}
		var flags uint16
		if !exec {
			flags |= FlagDevConsole
		}
		if o.PlainOutput {
			flags |= FlagPlainOutput
		}
		b.op(OpConsole, flags, "open terminal", new(enc).u16(uint16(w)).u16(uint16(h)).u32(p.User.UID))
	} else {
		b.stdio()
	}
	if !exec {
		b.finishRoot(spec)
	}
	b.workdir(p, exec)
	if home(p.Env) == "" {
		b.op(OpHome, 0, "look up home directory", new(enc).u32(p.User.UID))
	}
	if p.User.Umask != nil {
		b.op(OpUmask, 0, "set umask", new(enc).u32(*p.User.Umask))
	}
	if o.PreserveFDs > 0 {
		b.preserve(o.PreserveFDs)
	}
	if p.NoNewPrivileges {
		b.noNewPrivs()
	}
	gate := uint16(NoSlot)
	if o.Gate {
		gate = b.slot(Slot{Kind: SlotGate})
		b.op(OpClose, 0, "close descriptors", new(enc).u16(gate))
	}
	b.p.exec = len(b.p.Ops)
	b.rlimits(p.Rlimits) // as late as can be: they bind us too
	// Without no_new_privs a filter takes CAP_SYS_ADMIN, so it comes before the
	// ids; with it as late as can be, to spare it our own system calls.
	if !p.NoNewPrivileges {
		b.seccomp(o)
	}
	b.creds(p)
	if o.Lookup && len(p.Args) != 0 {
		b.op(OpLookup, 0, "look up "+p.Args[0], new(enc).strs(candidates(p)))
	}
	if p.NoNewPrivileges {
		b.seccomp(o)
	}
	if o.Gate {
		b.op(OpGate, 0, "wait for the start", new(enc).u16(gate))
	}
	for _, h := range o.StartHooks {
		if h.Env == nil {
			// not the spec's word, but what others do: the process's own
			h.Env = p.Env
			b.hooks([]specs.Hook{h}, o.StartState, FlagHookHome)
			continue
		}
		b.hooks([]specs.Hook{h}, o.StartState, 0)
	}
	b.exec(p, o)
}

func (b *builder) label(p *specs.Process, o Options) {
	if a := p.ApparmorProfile; a != "" && a != "unconfined" {
		if !o.AppArmor {
			b.err = fault.New(fault.Unsupported, "AppArmor profile %.64q cannot be applied: the host has no AppArmor", a)
			return
		}
		b.self("attr/apparmor/exec", "attr/exec", "exec "+a, "apply AppArmor profile "+a)
	}
	if l := p.SelinuxLabel; l != "" {
		if !o.SELinux {
			b.err = fault.New(fault.Unsupported, "SELinux label %.64q cannot be applied: the host has no SELinux", l)
			return
		}
		b.self("attr/exec", "", l, "apply SELinux label "+l)
	}
}

// sysctls are refused where they would change the host.
func (b *builder) sysctls(spec *specs.Spec) {
	ipc := []string{"kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem", "kernel/shmall", "kernel/shmmax", "kernel/shmmni", "kernel/shm_rmid_forced"}
	all := spec.Linux.Sysctl
	for _, k := range slices.Sorted(maps.Keys(all)) {
		// Dots and slashes trade places, whichever comes first is the separator.
		name := k
		if i := strings.IndexAny(k, "./"); i >= 0 && k[i] == '.' {
			name = strings.Map(func(r rune) rune {
				switch r {
				case '.':
					return '/'
				case '/':
					return '.'
				}
				return r
			}, k)
		}
		var need specs.LinuxNamespaceType
		switch {
		case path.Clean(name) != name || path.IsAbs(name) || strings.HasPrefix(name, "..") || len(name) > 400:
			b.fail("malformed sysctl %.128q", k)
			continue
		case slices.Contains(ipc, name) || strings.HasPrefix(name, "fs/mqueue/"):
			need = specs.IPCNamespace
		case strings.HasPrefix(name, "net/"):
			need = specs.NetworkNamespace
		case name == "kernel/domainname" || name == "kernel/hostname":
			need = specs.UTSNamespace
		case strings.HasPrefix(name, "user/"):
			need = specs.UserNamespace
		default:
			b.fail("sysctl %.128q is not confined to a namespace; set it on the host", k)
			continue
		}
		if _, ok := b.namespaces[need]; !ok {
			b.fail("sysctl %.128q needs a %s namespace of the container's own", k, need)
			continue
		}
		b.op(OpSysctl, 0, "set sysctl "+k, new(enc).str(name).str(all[k]))
	}
}

func (b *builder) protect(spec *specs.Spec) {
	clean := func(list []string, f func(string)) {
		seen := map[string]bool{}
		for _, p := range list {
			c, err := cleanTarget(p)
			if err != nil || !path.IsAbs(p) || c == "/" {
				b.fail("masked or read-only path %.128q is not a path inside the container", p)
				continue
			}
			if !seen[c] {
				f(c)
			}
			seen[c] = true
		}
	}
	clean(spec.Linux.ReadonlyPaths, b.readonly)
	clean(spec.Linux.MaskedPaths, b.mask)
}

// finishRoot is what had to wait until the root and /dev were filled.
func (b *builder) finishRoot(spec *specs.Spec) {
	for _, t := range b.late {
		b.attr(t, unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
	}
	if spec.Process.Cwd != "" {
		if c, err := cleanTarget(spec.Process.Cwd); err == nil && c != "/" {
			b.op(OpCwd, FlagCreate, "change to directory "+c, new(enc).str(c))
		}
	}
	if spec.Root != nil && spec.Root.Readonly {
		b.attr("/", unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
	}
	if f, ok := propagationFlag(spec.Linux.RootfsPropagation); ok && f&unix.MS_SHARED != 0 {
		var flags uint16
		if f&unix.MS_REC != 0 {
			flags |= FlagRecursive
		}
		b.attr("/", 0, 0, f&^unix.MS_REC, flags)
	}
}

func (b *builder) workdir(p *specs.Process, exec bool) {
	if p.Cwd != "" && !path.IsAbs(p.Cwd) {
		b.fail("working directory %.128q is not absolute", p.Cwd)
		return
	}
	c, err := cleanTarget("/" + p.Cwd)
	if err != nil {
		b.err = err
		return
	}
	if exec || c == "/" {
		b.op(OpCwd, 0, "change to directory "+c, new(enc).str(c))
	}
}

func (b *builder) preserve(n int) {
	if n > 1024 {
		b.fail("%d preserved descriptors are too many (limit 1024)", n)
		return
	}
	e := new(enc).count(n)
	for i := range n {
		e.u16(b.slot(Slot{Kind: SlotExtra, Source: strconv.Itoa(3 + i)}))
	}
	b.op(OpFDs, 0, "pass descriptors", e)
}

func (b *builder) creds(p *specs.Process) {
	var sets [5]uint64
	var flags uint16
	if c := p.Capabilities; c != nil {
		flags |= FlagHasCaps
		for i, l := range [][]string{c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient} {
			m, err := CapabilityMask(l)
			if err != nil && b.err == nil {
				b.err = err
			}
			sets[i] = m
		}
		if sets[1]&^sets[2] != 0 {
			b.fail("effective capabilities are not all permitted")
		}
		if sets[4]&^(sets[2]&sets[3]) != 0 {
			b.fail("ambient capabilities are not all permitted and inheritable")
		}
	}
	if len(p.User.AdditionalGids) > 1024 {
		b.fail("%d additional groups are too many (limit 1024)", len(p.User.AdditionalGids))
		return
	}
	if p.User.UID == math.MaxUint32 || p.User.GID == math.MaxUint32 {
		b.fail("user or group id 4294967295 is reserved")
	}
	e := new(enc).u32(p.User.UID).u32(p.User.GID)
	for _, s := range sets {
		e.u64(s)
	}
	e.count(len(p.User.AdditionalGids))
	for _, g := range p.User.AdditionalGids {
		e.u32(g)
	}
	if b.keepGroups {
		flags |= FlagKeepGroups
	}
	b.op(OpCreds, flags, "change user to "+fmt.Sprintf("%d:%d", p.User.UID, p.User.GID), e)
}

func (b *builder) exec(p *specs.Process, o Options) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		b.fail("no command to run")
		return
	}
	env := make([]string, 0, len(p.Env))
	at := make(map[string]int, len(p.Env))
	for _, v := range p.Env {
		name, _, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			b.fail("environment variable %.64q is not NAME=VALUE", v)
		}
		if i, twice := at[name]; twice {
			env[i] = v // the last one counts, as in a shell
			continue
		}
		at[name] = len(env)
		env = append(env, v)
	}
	if i, ok := at["HOME"]; ok && env[i] == "HOME=" {
		env = slices.Delete(env, i, i+1) // the one that was looked up takes its place
	}
	var flags uint16
	if o.Init {
		flags |= FlagInit
	}
	b.op(OpExec, flags, "exec "+p.Args[0], new(enc).strs(candidates(p)).longs(p.Args).longs(env))
}

// home is the home directory that the environment says, "" if none.
func home(env []string) (dir string) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "HOME="); ok {
			dir = v
		}
	}
	return dir
}

// candidates are the paths that execvpe would try.
func candidates(p *specs.Process) []string {
	name := p.Args[0]
	if strings.Contains(name, "/") || len(name) > 255 {
		return []string{name}
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, v := range p.Env {
		if s, ok := strings.CutPrefix(v, "PATH="); ok {
			search = s
		}
	}
	var out []string
	for _, dir := range strings.Split(search, ":") {
		if len(dir) < unix.PathMax-256 {
			out = append(out, path.Join("/", dir, name))
		}
		if !path.IsAbs(dir) { // relative to the working directory, as execvpe has it
			out[len(out)-1] = "./" + path.Join(dir, name)
		}
	}
	return out
}
