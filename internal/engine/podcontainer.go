package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/namespace"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/pattern"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// attrPod is the attribute of events that names the pod.
const attrPod = "io.servin.pod"

// PodContainer is a container to be made in a pod.
type PodContainer struct {
	// Name and Attempt are unique within the pod.
	Name    string
	Attempt uint32
	Config  *mcontainer.Config
	// HostConfig says what Docker's vocabulary can; its modes are the pod's to say.
	HostConfig *mcontainer.HostConfig
	Member     container.Member
	// IDMapped and Relabel are targets of mounts whose owners are mapped, and whose
	// sources get the container's SELinux label.
	IDMapped, Relabel []string
}

// PodContainerCreate makes a container in a pod. When it returns, the record is
// on disk.
func (e *Engine) PodContainerCreate(ctx context.Context, podID string, c PodContainer) (string, error) {
	p, err := e.lookupPod(podID)
	if err != nil {
		return "", err
	}
	r := p.rec.Load()
	if !r.Ready {
		return "", fault.New(fault.Conflict, "cannot create container: pod %s is not ready", short(p.id))
	}
	m := c.Member
	m.Pod, m.Name = p.id, c.Name
	if err := e.checkMember(ctx, r, &m, c); err != nil {
		return "", err
	}
	hc := c.HostConfig
	// The modes that keep the engine from giving it anything of its own; joinPod
	// says what it really gets.
	hc.NetworkMode = mcontainer.NetworkMode("container:" + p.id)
	hc.IpcMode, hc.PidMode, hc.UTSMode = mcontainer.IPCModePrivate, "", ""
	hc.Runtime, hc.CgroupParent = r.Runtime, r.CgroupParent
	hc.LogConfig = mcontainer.LogConfig{Type: "k8s-file", Config: map[string]string{"max-size": "-1"}} // the kubelet rotates
	if m.Log == "" {
		hc.LogConfig = mcontainer.LogConfig{Type: "none", Config: map[string]string{}}
	}
	c.Config.Healthcheck = &mcontainer.HealthConfig{Test: []string{"NONE"}}
	res, err := e.ContainerCreate(ctx, CreateRequest{
		Name: memberName(r, c.Name, c.Attempt), Config: c.Config, HostConfig: hc, member: &m, idmapped: c.IDMapped, relabel: c.Relabel,
	})
	if fault.Is(err, fault.Conflict) {
		return "", fault.New(fault.Conflict, "container %q, attempt %d, exists in pod %s already: %w", c.Name, c.Attempt, short(p.id), err)
	}
	return res.ID, err
}

// notInNames is what names of containers cannot hold.
var notInNames = pattern.New(`[^a-zA-Z0-9_.-]`)

// memberName is the name under which a pod's container is known to all. Pods of
// Kubernetes that were made anew have containers of the same names.
func memberName(p *container.Pod, name string, attempt uint32) string {
	full := fmt.Sprintf("k8s_%s_%s_%s_%s_%d", name, p.Name, p.Namespace, p.UID, attempt)
	if p.Attempt > 0 {
		full += "_" + strconv.FormatUint(uint64(p.Attempt), 10)
	}
	if len(full) > maxMemberName {
		sum := sha256.Sum256([]byte(full))
		full = full[:maxMemberName-17] + "_" + hex.EncodeToString(sum[:8])
	}
	return notInNames.ReplaceAllString(full, "-")
}

// maxMemberName is how long names of containers may be.
const maxMemberName = 255

// checkMember refuses what cannot be, before anything is made.
func (e *Engine) checkMember(ctx context.Context, p *container.Pod, m *container.Member, c PodContainer) error {
	if _, err := oci.Capabilities(c.HostConfig, e.cfg.Host); err != nil {
		return err
	}
	for _, name := range m.Ambient {
		if !slices.Contains(e.cfg.Host.Capabilities, name) {
			return fault.New(fault.Invalid, "cannot give the ambient capability %q: this host does not have it", name)
		}
	}
	switch m.PID {
	case container.NamespaceTarget:
		u, err := e.lookup(m.Target)
		if err != nil {
			return fault.New(fault.Invalid, "cannot see the processes of container %q: %w", m.Target, err)
		}
		o := u.rec.Load()
		if o.Pod == nil || o.Pod.Pod != m.Pod {
			return fault.New(fault.Invalid, "cannot see the processes of container %q: it is of another pod", m.Target)
		}
		m.Target = u.id
	case container.NamespacePod:
		if p.PID != container.NamespacePod {
			m.PID = container.NamespaceContainer
		}
	case container.NamespaceHost, container.NamespaceContainer:
	default:
		return fault.New(fault.Invalid, "unknown pid namespace mode %q", m.PID)
	}
	if p.UserNS.Size != 0 && m.PID == container.NamespaceHost {
		return fault.New(fault.Invalid, "cannot see the host's processes from a user namespace of the pod's own")
	}
	if len(m.Unified) > 0 && !e.cfg.CgroupV2 {
		return fault.New(fault.Unsupported, "cannot use unified resources: this host has no cgroup v2")
	}
	if m.Log != "" && !filepath.IsAbs(m.Log) {
		return fault.New(fault.Invalid, "the log's path %q must be absolute", m.Log)
	}
	return e.checkImageMounts(ctx, c.HostConfig.Mounts)
}

// checkImageMounts looks for the parts of images that are to be mounted.
func (e *Engine) checkImageMounts(ctx context.Context, mounts []mount.Mount) error {
	for _, m := range mounts {
		if m.Type != mount.TypeImage || m.ImageOptions == nil || m.ImageOptions.Subpath == "" {
			continue
		}
		img, err := e.cfg.Images.Resolve(ctx, m.Source, "")
		if err != nil {
			return err
		}
		root, err := e.cfg.Snapshots.MountChain(ctx, img.Chain, snapshot.IDMap{})
		if err != nil {
			return fmt.Errorf("cannot mount image %s: %w", m.Source, err)
		}
		f, err := openIn(root, m.ImageOptions.Subpath, unix.O_PATH, 0)
		root.Close()
		if err != nil {
			return fault.New(fault.Invalid, "cannot mount %s of image %s: %w", m.ImageOptions.Subpath, m.Source, err)
		}
		f.Close()
	}
	return nil
}

// memberModes are a member's limits and rights with the namespaces that it really
// gets, for who judges them.
func (e *Engine) memberModes(hc *mcontainer.HostConfig, m *container.Member) *mcontainer.HostConfig {
	c := *hc
	c.NetworkMode = "pod"
	p, err := e.lookupPod(m.Pod)
	if err != nil {
		return &c
	}
	r := p.rec.Load()
	if r.Network == container.NamespaceHost {
		c.NetworkMode, c.UTSMode = "host", "host"
	}
	if r.IPC == container.NamespaceHost {
		c.IpcMode = "host"
	}
	if m.PID == container.NamespaceHost {
		c.PidMode = "host"
	}
	return &c
}

// podOf finds the pod of a container; it must be there for as long as the
// container is.
func (e *Engine) podOf(r *container.Record) (*pod, *container.Pod, error) {
	p, err := e.lookupPod(r.Pod.Pod)
	if err != nil {
		return nil, nil, err
	}
	return p, p.rec.Load(), nil
}

// lookupUser finds a container's user. In a pod, the groups that the image gives
// the user are added even where its primary group is named, unless the pod says
// Strict; with Docker, naming the group leaves them out.
func lookupUser(root *os.File, r *container.Record) (u specs.User, home string, err error) {
	if u, home, err = oci.LookupUser(root, r.Config.User, r.HostConfig.GroupAdd); err != nil || r.Pod == nil || r.Pod.Strict {
		return u, home, err
	}
	name, _, named := strings.Cut(r.Config.User, ":")
	if !named {
		return u, home, nil
	}
	own, _, err := oci.LookupUser(root, name, nil)
	if err != nil {
		return u, home, err
	}
	for _, g := range own.AdditionalGids[1:] { // the first is the user's primary group, which the pod replaces
		if !slices.Contains(u.AdditionalGids, g) {
			u.AdditionalGids = append(u.AdditionalGids, g)
		}
	}
	return u, home, nil
}

// joinPod has a container join its pod's namespaces.
func (e *Engine) joinPod(r *container.Record, in *oci.Input, back *scope) error {
	p, pr, err := e.podOf(r)
	if err != nil {
		return err
	}
	if !pr.Ready {
		return fault.New(fault.Conflict, "pod %s is not ready", short(p.id))
	}
	m := r.Pod
	if m.Strict {
		in.User.AdditionalGids = append([]uint32{in.User.GID}, m.Groups...)
	}
	if err := e.joinSet(p, pr, in, back); err != nil {
		return err
	}
	pid := func(t interface{ Pid() int }) error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", t.Pid()))
		if err != nil {
			return fault.New(fault.Conflict, "cannot join the pid namespace: %w", err)
		}
		back.hold(f)
		in.Join.PID = fdPath(f)
		return nil
	}
	switch m.PID {
	case container.NamespaceHost:
		in.HostConfig.PidMode = "host"
	case container.NamespacePod:
		p.mu.Lock()
		t := p.pause
		p.mu.Unlock()
		if t == nil || gone(t) {
			return fault.New(fault.Conflict, "pod %s is not ready: its pause is gone", short(p.id))
		}
		return pid(t)
	case container.NamespaceTarget:
		o, err := e.lookup(m.Target)
		if err != nil {
			return err
		}
		t := o.running()
		if t == nil {
			return fault.New(fault.Conflict, "cannot join the pid namespace of container %s: it does not run", short(m.Target))
		}
		if o.rec.Load().Pod.PID == container.NamespaceHost {
			in.HostConfig.PidMode = "host"
			return nil
		}
		return pid(t)
	}
	return nil
}

// joinSet joins the pinned namespaces. in.HostConfig becomes a copy.
func (e *Engine) joinSet(p *pod, r *container.Pod, in *oci.Input, back *scope) error {
	hc := *in.HostConfig
	in.HostConfig = &hc
	var err error
	open := func(kind string) string {
		if err != nil {
			return ""
		}
		var f *os.File
		if f, err = os.Open(namespace.Path(p.dir, kind)); err != nil {
			err = fault.New(fault.Conflict, "pod %s is not ready: %w", short(p.id), err)
			return ""
		}
		back.hold(f)
		return fdPath(f)
	}
	if r.UserNS.Size != 0 {
		in.Join.User, in.Join.Owned = open("user"), true
	}
	if r.Network == container.NamespaceHost {
		hc.NetworkMode, hc.UTSMode = "host", "host"
	} else {
		in.Join.Network, in.Join.UTS = open("net"), open("uts")
	}
	if r.IPC == container.NamespaceHost {
		hc.IpcMode, in.ShmSource = "host", "/dev/shm"
	} else {
		in.Join.IPC, in.ShmSource = open("ipc"), filepath.Join(p.dir, "shm")
	}
	return err
}

// finishMember adds to a generated spec what Docker's vocabulary lacks, and notes
// who the first process is.
func finishMember(r *container.Record, spec *specs.Spec) *container.MemberUser {
	m := r.Pod
	if c := spec.Process.Capabilities; c != nil && len(m.Ambient) > 0 {
		n := *c
		for _, set := range []*[]string{&n.Bounding, &n.Permitted, &n.Effective, &n.Inheritable, &n.Ambient} {
			list := slices.Clone(*set)
			for _, name := range m.Ambient {
				if !slices.Contains(list, name) {
					list = append(list, name)
				}
			}
			*set = list
		}
		spec.Process.Capabilities = &n
	}
	if res := spec.Linux.Resources; res != nil {
		for _, size := range slices.Sorted(maps.Keys(m.Hugepages)) {
			res.HugepageLimits = append(res.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: m.Hugepages[size]})
		}
		if len(m.Unified) > 0 {
			res.Unified = maps.Clone(m.Unified)
		}
	}
	return &container.MemberUser{UID: spec.Process.User.UID, GID: spec.Process.User.GID, Groups: slices.Clone(spec.Process.User.AdditionalGids)}
}

// memberMounts marks what Docker's mounts cannot say.
func memberMounts(r *container.Record, req *CreateRequest) {
	points := slices.Clone(r.Mounts)
	for i := range points {
		p := &points[i]
		p.IDMap = p.IDMap || slices.Contains(req.idmapped, p.Target)
		if slices.Contains(req.relabel, p.Target) {
			p.Relabel = "z"
		}
	}
	r.Mounts = points
}

// PodContainerUpdate changes the limits of a pod's container: what res sets, and
// hugepages and unified settings where they are given.
func (e *Engine) PodContainerUpdate(ctx context.Context, id string, res mcontainer.Resources, hugepages map[string]uint64, unified map[string]string, edge []byte) error {
	u, err := e.memberUnit(id)
	if err != nil {
		return err
	}
	if len(unified) > 0 && !e.cfg.CgroupV2 {
		return fault.New(fault.Unsupported, "cannot use unified resources: this host has no cgroup v2")
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	switch r.State.Status {
	case mcontainer.StateCreated, mcontainer.StateRunning:
	default:
		return fault.New(fault.Conflict, "cannot update container %s: it is neither created nor running", short(u.id))
	}
	hc := *r.HostConfig
	if err := mergeResources(&hc.Resources, &res); err != nil {
		return err
	}
	m := *r.Pod
	if hugepages != nil {
		m.Hugepages = hugepages
	}
	if unified != nil {
		m.Unified = unified
	}
	m.Edge = edge
	if e.policed() {
		if err := e.mayLimit(ctx, r, &hc); err != nil {
			return err
		}
	}
	if t := u.running(); t != nil {
		lr, err := oci.Resources(&hc.Resources, oci.DevicesAt)
		if err != nil {
			return err
		}
		for _, size := range slices.Sorted(maps.Keys(hugepages)) {
			lr.HugepageLimits = append(lr.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: hugepages[size]})
		}
		lr.Unified = unified
		if err := e.hookUpdate(ctx, r, lr); err != nil {
			return err
		}
		if err := t.Update(ctx, lr); err != nil {
			return fault.New(fault.Of(err), "cannot update container %s: %w", short(u.id), err)
		}
	}
	_, pend, err := e.change(u, func(n *container.Record) { n.HostConfig, n.Pod = &hc, &m })
	if err == nil {
		err = pend.Wait()
	}
	return err
}

// memberUnit finds a container of a pod; others are none of Kubernetes' business.
func (e *Engine) memberUnit(id string) (*unit, error) {
	u, err := e.lookup(id)
	if err == nil && u.rec.Load().Pod == nil {
		err = fault.New(fault.NotFound, "No such container: %s", id)
	}
	return u, err
}
