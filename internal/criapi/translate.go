package criapi

import (
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// translate puts a container's configuration into the engine's words.
func translate(p *container.Pod, c *v1.ContainerConfig) (engine.PodContainer, error) {
	if c.GetWindows() != nil {
		return engine.PodContainer{}, fault.New(fault.Unsupported, "cannot create container: this engine runs on Linux")
	}
	t := &translator{p: p, in: c, sec: c.GetLinux().GetSecurityContext()}
	t.out = engine.PodContainer{
		Name: c.GetMetadata().GetName(), Attempt: c.GetMetadata().GetAttempt(),
		Config: &mcontainer.Config{
			Image: c.GetImage().GetImage(), Entrypoint: c.GetCommand(), Cmd: c.GetArgs(), WorkingDir: c.GetWorkingDir(), Labels: c.GetLabels(),
			OpenStdin: c.GetStdin(), StdinOnce: c.GetStdinOnce(), Tty: c.GetTty(),
		},
		HostConfig: &mcontainer.HostConfig{Annotations: c.GetAnnotations()},
	}
	for _, e := range c.GetEnvs() {
		t.out.Config.Env = append(t.out.Config.Env, e.GetKey()+"="+string(e.GetValue()))
	}
	if sig := c.GetStopSignal(); sig != v1.Signal_SIGNAL_RUNTIME_DEFAULT {
		t.out.Config.StopSignal = signalName(sig)
	}
	for _, step := range []func() error{t.user, t.namespaces, t.capabilities, t.security, t.mounts, t.devices, t.limits} {
		if err := step(); err != nil {
			return engine.PodContainer{}, err
		}
	}
	return t.out, nil
}

type translator struct {
	p   *container.Pod
	in  *v1.ContainerConfig
	sec *v1.LinuxContainerSecurityContext
	out engine.PodContainer
}

// signalName turns SIGNAL_SIGRTMINPLUS3 into SIGRTMIN+3.
func signalName(s v1.Signal) string {
	n := strings.TrimPrefix(s.String(), "SIGNAL_")
	n = strings.Replace(n, "PLUS", "+", 1)
	return strings.Replace(n, "MINUS", "-", 1)
}

// statusSignal is the signal that stops the container: what it was created with,
// or its image's.
func statusSignal(c *v1.ContainerConfig, r *container.Record) v1.Signal {
	if s := c.GetStopSignal(); s != v1.Signal_SIGNAL_RUNTIME_DEFAULT {
		return s
	}
	name := strings.ToUpper(r.Config.StopSignal)
	if name == "" {
		return v1.Signal_SIGNAL_SIGTERM
	}
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	name = strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)
	return v1.Signal(v1.Signal_value["SIGNAL_"+name])
}

func (t *translator) user() error {
	s, m := t.sec, &t.out.Member
	uid, gid := s.GetRunAsUser(), s.GetRunAsGroup()
	name := s.GetRunAsUsername()
	if gid != nil && uid == nil && name == "" {
		return invalid("cannot create container: run_as_group is given without run_as_user")
	}
	for _, v := range []*v1.Int64Value{uid, gid} {
		if v.GetValue() < 0 || v.GetValue() > 1<<32-2 {
			return invalid("cannot create container: %d is no id of a user or group", v.GetValue())
		}
	}
	if strings.ContainsAny(name, ":\x00") {
		return invalid("cannot create container: invalid user name %q", name)
	}
	user := name
	if uid != nil {
		user = strconv.FormatInt(uid.GetValue(), 10)
	}
	if user != "" && gid != nil {
		user += ":" + strconv.FormatInt(gid.GetValue(), 10)
	}
	t.out.Config.User = user
	for _, g := range s.GetSupplementalGroups() {
		if g < 0 || g > 1<<32-2 {
			return invalid("cannot create container: %d is no id of a group", g)
		}
		m.Groups = append(m.Groups, uint32(g))
		t.out.HostConfig.GroupAdd = append(t.out.HostConfig.GroupAdd, strconv.FormatInt(g, 10))
	}
	switch s.GetSupplementalGroupsPolicy() {
	case v1.SupplementalGroupsPolicy_Merge:
	case v1.SupplementalGroupsPolicy_Strict:
		m.Strict = true
	default:
		return invalid("cannot create container: unknown policy of supplemental groups: %s", s.GetSupplementalGroupsPolicy())
	}
	return nil
}

func (t *translator) namespaces() error {
	m, ns := &t.out.Member, t.sec.GetNamespaceOptions()
	if ns == nil {
		m.PID = t.p.PID
		return nil
	}
	switch ns.GetPid() {
	case v1.NamespaceMode_POD:
		m.PID = container.NamespacePod
	case v1.NamespaceMode_CONTAINER:
		m.PID = container.NamespaceContainer
	case v1.NamespaceMode_NODE:
		m.PID = container.NamespaceHost
	case v1.NamespaceMode_TARGET:
		m.PID, m.Target = container.NamespaceTarget, ns.GetTargetId()
	default:
		return invalid("cannot create container: unknown pid namespace mode %s", ns.GetPid())
	}
	return nil
}

func (t *translator) capabilities() error {
	hc, c := t.out.HostConfig, t.sec.GetCapabilities()
	hc.Privileged = t.sec.GetPrivileged()
	if hc.Privileged {
		return nil
	}
	hc.CapAdd, hc.CapDrop = c.GetAddCapabilities(), c.GetDropCapabilities()
	for _, name := range c.GetAddAmbientCapabilities() {
		n := strings.ToUpper(name)
		if !strings.HasPrefix(n, "CAP_") {
			n = "CAP_" + n
		}
		t.out.Member.Ambient = append(t.out.Member.Ambient, n)
	}
	return nil
}

// maxProfile bounds a seccomp profile's file.
const maxProfile = 1 << 20

// seccompOption finds the security option of a profile; nil is no profile at all.
func seccompOption(p *v1.SecurityProfile) (string, error) {
	if p == nil {
		return "seccomp=unconfined", nil
	}
	switch p.GetProfileType() {
	case v1.SecurityProfile_Unconfined:
		return "seccomp=unconfined", nil
	case v1.SecurityProfile_RuntimeDefault:
		return "seccomp=builtin", nil
	case v1.SecurityProfile_Localhost:
		name := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
		if !path.IsAbs(name) {
			return "", invalid("cannot load seccomp profile %q: its path must be absolute", name)
		}
		f, err := os.Open(name)
		if err != nil {
			return "", invalid("cannot load seccomp profile: %w", err)
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return "", invalid("cannot load seccomp profile %s: it is no regular file", name)
		}
		b, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
		if err != nil || len(b) > maxProfile {
			return "", invalid("cannot load seccomp profile %s: it cannot be read or is larger than %d bytes", name, maxProfile)
		}
		return "seccomp=" + string(b), nil
	}
	return "", invalid("unknown seccomp profile type %s", p.GetProfileType())
}

// podSeccomp refuses what a pod's security context cannot mean.
func podSeccomp(s *v1.LinuxSandboxSecurityContext) error {
	_, err := seccompOption(s.GetSeccomp())
	return err
}

func (t *translator) security() error {
	hc, s := t.out.HostConfig, t.sec
	hc.ReadonlyRootfs = s.GetReadonlyRootfs()
	if !hc.Privileged {
		o, err := seccompOption(s.GetSeccomp())
		if err != nil {
			return err
		}
		hc.SecurityOpt = append(hc.SecurityOpt, o)
	}
	o, err := armorOption(s)
	if err != nil {
		return err
	}
	if o != "" {
		hc.SecurityOpt = append(hc.SecurityOpt, o)
	}
	if s.GetNoNewPrivs() {
		hc.SecurityOpt = append(hc.SecurityOpt, "no-new-privileges")
	}
	if l := s.GetSelinuxOptions(); l != nil {
		for k, v := range map[string]string{"user": l.GetUser(), "role": l.GetRole(), "type": l.GetType(), "level": l.GetLevel()} {
			if v != "" {
				hc.SecurityOpt = append(hc.SecurityOpt, "label="+k+":"+v)
			}
		}
		slices.Sort(hc.SecurityOpt)
	}
	for _, l := range [][]string{s.GetMaskedPaths(), s.GetReadonlyPaths()} {
		for _, p := range l {
			if !path.IsAbs(p) || strings.ContainsRune(p, 0) {
				return invalid("cannot create container: masked and read-only paths must be absolute, %q is not", p)
			}
		}
	}
	if hc.Privileged {
		return nil
	}
	hc.MaskedPaths, hc.ReadonlyPaths = s.GetMaskedPaths(), s.GetReadonlyPaths()
	if s != nil && t.p.UserNS.Size > 0 {
		// Where processes have no right on the host, an empty list is taken by its
		// word: procMount Unmasked. Elsewhere it is a client that knows no such list.
		if hc.MaskedPaths == nil {
			hc.MaskedPaths = []string{}
		}
		if hc.ReadonlyPaths == nil {
			hc.ReadonlyPaths = []string{}
		}
	}
	return nil
}

func armorOption(s *v1.LinuxContainerSecurityContext) (string, error) {
	p := s.GetApparmor()
	if p == nil {
		//nolint:staticcheck // the field of old clients
		switch old := s.GetApparmorProfile(); {
		case old == "", old == "runtime/default":
			return "", nil
		case old == "unconfined":
			return "apparmor=unconfined", nil
		case strings.HasPrefix(old, "localhost/"):
			p = &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: old}
		default:
			return "", invalid("invalid AppArmor profile %q", old)
		}
	}
	switch p.GetProfileType() {
	case v1.SecurityProfile_RuntimeDefault:
		return "", nil
	case v1.SecurityProfile_Unconfined:
		return "apparmor=unconfined", nil
	case v1.SecurityProfile_Localhost:
		name := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
		if name == "" || strings.ContainsAny(name, " \n\x00") {
			return "", invalid("invalid AppArmor profile %q", name)
		}
		if !armorLoaded(name) {
			return "", invalid("AppArmor profile %q is not loaded", name)
		}
		return "apparmor=" + name, nil
	}
	return "", invalid("unknown AppArmor profile type %s", p.GetProfileType())
}

// armorLoaded asks the kernel for a profile; where it has no AppArmor, nothing is.
func armorLoaded(name string) bool {
	b, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if have, _, ok := strings.Cut(line, " ("); ok && have == name {
			return true
		}
	}
	return false
}

func (t *translator) mounts() error {
	for _, m := range t.in.GetMounts() {
		target := m.GetContainerPath()
		if target == "" {
			return invalid("cannot create container: a mount has no path in the container")
		}
		if !path.IsAbs(target) {
			target = "/" + target
		}
		target = path.Clean(target)
		out := mount.Mount{Type: mount.TypeBind, Source: m.GetHostPath(), Target: target, ReadOnly: m.GetReadonly()}
		if len(m.GetMountOptions()) > 0 {
			return fault.New(fault.Unsupported, "cannot mount at %s: options of mounts are not supported", target)
		}
		if m.GetRecursiveReadOnly() {
			if !m.GetReadonly() {
				return invalid("cannot mount at %s: recursive_read_only needs readonly", target)
			}
			if m.GetPropagation() != v1.MountPropagation_PROPAGATION_PRIVATE {
				return invalid("cannot mount at %s: recursive_read_only needs private propagation", target)
			}
		}
		if name := m.GetImage().GetImage(); name != "" {
			if m.GetHostPath() != "" {
				return invalid("cannot mount at %s: both an image and a host path are given", target)
			}
			if !m.GetReadonly() {
				return invalid("cannot mount at %s: images are mounted read-only, readonly must be set", target)
			}
			if sub := m.GetImageSubPath(); sub != "" && slices.Contains(strings.Split(sub, "/"), "..") {
				return invalid("cannot mount at %s: the part %q leads out of the image", target, sub)
			}
			out.Type, out.Source, out.ImageOptions = mount.TypeImage, name, &mount.ImageOptions{Subpath: m.GetImageSubPath()}
			t.out.HostConfig.Mounts = append(t.out.HostConfig.Mounts, out)
			continue
		}
		if !path.IsAbs(m.GetHostPath()) {
			return invalid("cannot mount at %s: host path %q is not absolute", target, m.GetHostPath())
		}
		o := &mount.BindOptions{CreateMountpoint: true, ReadOnlyNonRecursive: m.GetReadonly() && !m.GetRecursiveReadOnly(), ReadOnlyForceRecursive: m.GetRecursiveReadOnly()}
		switch m.GetPropagation() {
		case v1.MountPropagation_PROPAGATION_PRIVATE:
			o.Propagation = mount.PropagationRPrivate
		case v1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			o.Propagation = mount.PropagationRSlave
		case v1.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			o.Propagation = mount.PropagationRShared
		default:
			return invalid("cannot mount at %s: unknown propagation %s", target, m.GetPropagation())
		}
		out.BindOptions = o
		if err := t.mapped(m, target); err != nil {
			return err
		}
		if m.GetSelinuxRelabel() {
			t.out.Relabel = append(t.out.Relabel, target)
		}
		t.out.HostConfig.Mounts = append(t.out.HostConfig.Mounts, out)
	}
	return nil
}

// mapped notes a mount whose owners are mapped as the pod's users are.
func (t *translator) mapped(m *v1.Mount, target string) error {
	if len(m.GetUidMappings())+len(m.GetGidMappings()) == 0 {
		return nil
	}
	for _, l := range [][]*v1.IDMapping{m.GetUidMappings(), m.GetGidMappings()} {
		if len(l) != 1 || l[0].GetContainerId() != 0 || l[0].GetHostId() != t.p.UserNS.Host || l[0].GetLength() != t.p.UserNS.Size {
			return invalid("cannot mount at %s: its owners must be mapped as the pod's users are", target)
		}
	}
	t.out.IDMapped = append(t.out.IDMapped, target)
	return nil
}

func (t *translator) devices() error {
	hc := t.out.HostConfig
	for _, d := range t.in.GetDevices() {
		if !path.IsAbs(d.GetHostPath()) {
			return invalid("cannot add device %q: its path must be absolute", d.GetHostPath())
		}
		hc.Devices = append(hc.Devices, mcontainer.DeviceMapping{PathOnHost: d.GetHostPath(), PathInContainer: d.GetContainerPath(), CgroupPermissions: d.GetPermissions()})
	}
	var names []string
	for _, d := range t.in.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	if len(names) == 0 {
		// Device plugins of before said it with annotations.
		for k, v := range t.in.GetAnnotations() {
			if strings.HasPrefix(k, "cdi.k8s.io/") {
				names = append(names, strings.Split(v, ",")...)
			}
		}
		slices.Sort(names)
	}
	if len(names) > 0 {
		hc.DeviceRequests = append(hc.DeviceRequests, mcontainer.DeviceRequest{Driver: "cdi", DeviceIDs: slices.Compact(names)})
	}
	return nil
}

func (t *translator) limits() (err error) {
	l := t.in.GetLinux().GetResources()
	if l == nil {
		return nil
	}
	m := &t.out.Member
	if t.out.HostConfig.Resources, m.Hugepages, m.Unified, err = mergeLimits(t.out.HostConfig.Resources, l); err != nil {
		return err
	}
	if l.GetOomScoreAdj() < -1000 || l.GetOomScoreAdj() > 1000 {
		return invalid("oom_score_adj %d is not from -1000 to 1000", l.GetOomScoreAdj())
	}
	t.out.HostConfig.OomScoreAdj = int(l.GetOomScoreAdj())
	return nil
}

// mergeLimits adds limits to resources that hold devices already.
func mergeLimits(r mcontainer.Resources, l *v1.LinuxContainerResources) (mcontainer.Resources, map[string]uint64, map[string]string, error) {
	n, huge, unified, err := resources(l)
	n.Devices, n.DeviceRequests = r.Devices, r.DeviceRequests
	return n, huge, unified, err
}

// resources converts limits; zero leaves one alone.
func resources(l *v1.LinuxContainerResources) (r mcontainer.Resources, huge map[string]uint64, unified map[string]string, err error) {
	for name, v := range map[string]int64{
		"cpu_period": l.GetCpuPeriod(), "cpu_shares": l.GetCpuShares(), "memory_limit_in_bytes": l.GetMemoryLimitInBytes(),
	} {
		if v < 0 {
			return r, nil, nil, invalid("%s %d is negative", name, v)
		}
	}
	r = mcontainer.Resources{
		CPUPeriod: l.GetCpuPeriod(), CPUQuota: l.GetCpuQuota(), CPUShares: l.GetCpuShares(), Memory: l.GetMemoryLimitInBytes(),
		MemorySwap: l.GetMemorySwapLimitInBytes(), CpusetCpus: l.GetCpusetCpus(), CpusetMems: l.GetCpusetMems(),
	}
	if r.MemorySwap > 0 && r.MemorySwap < r.Memory {
		return r, nil, nil, invalid("memory_swap_limit_in_bytes %d is less than memory_limit_in_bytes %d", r.MemorySwap, r.Memory)
	}
	for _, h := range l.GetHugepageLimits() {
		if huge == nil {
			huge = map[string]uint64{}
		}
		if strings.ContainsAny(h.GetPageSize(), "/.\x00") || h.GetPageSize() == "" {
			return r, nil, nil, invalid("invalid page size %q", h.GetPageSize())
		}
		huge[h.GetPageSize()] = h.GetLimit()
	}
	for k, v := range l.GetUnified() {
		if k == "" || strings.ContainsAny(k, "/\x00") || !strings.Contains(k, ".") || strings.HasPrefix(k, "cgroup.") {
			return r, nil, nil, invalid("invalid unified resource %q", k)
		}
		if unified == nil {
			unified = map[string]string{}
		}
		unified[k] = v
	}
	return r, huge, unified, nil
}
