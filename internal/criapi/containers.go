package criapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"google.golang.org/protobuf/proto"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func now() int64 { return time.Now().UnixNano() }

// CreateContainer implements the CRI.
func (s *Server) CreateContainer(ctx context.Context, req *v1.CreateContainerRequest) (*v1.CreateContainerResponse, error) {
	p, err := s.cfg.Engine.Pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	conf := req.GetConfig()
	if conf.GetMetadata().GetName() == "" {
		return nil, invalid("cannot create container: its metadata must name it")
	}
	if conf.GetImage().GetImage() == "" {
		return nil, invalid("cannot create container: its image must be given")
	}
	sandbox := req.GetSandboxConfig()
	if sandbox == nil {
		sandbox = new(v1.PodSandboxConfig)
		if err := proto.Unmarshal(p.Edge, sandbox); err != nil {
			return nil, err
		}
	}
	kept := proto.CloneOf(conf)
	kept.Envs = nil // they are in the container's record, once is enough
	if err := s.nameImages(ctx, kept); err != nil {
		return nil, err
	}
	c, err := translate(p, conf)
	if err != nil {
		return nil, err
	}
	c.Member.Log = logPath(sandbox, conf)
	if c.Member.Edge, err = proto.Marshal(kept); err != nil {
		return nil, err
	}
	id, err := s.cfg.Engine.PodContainerCreate(ctx, p.ID, c)
	if err != nil {
		return nil, err
	}
	return &v1.CreateContainerResponse{ContainerId: id}, nil
}

// logPath is where a container's output goes; "" is nowhere.
func logPath(sandbox *v1.PodSandboxConfig, c *v1.ContainerConfig) string {
	if c.GetLogPath() == "" || sandbox.GetLogDirectory() == "" {
		return ""
	}
	return filepath.Join(sandbox.GetLogDirectory(), c.GetLogPath())
}

// nameImages notes the ids of the images that the configuration refers to.
func (s *Server) nameImages(ctx context.Context, c *v1.ContainerConfig) error {
	img, err := s.cfg.Images.Inspect(ctx, c.Image.Image, "", false)
	if err != nil {
		return err
	}
	c.Image.ImageRef = img.ID
	if d := fullNames(img.RepoDigests); len(d) > 0 {
		c.Image.ImageRef = d[0]
	}
	for _, m := range c.Mounts {
		if name := m.GetImage().GetImage(); name != "" {
			img, err := s.cfg.Images.Inspect(ctx, name, "", false)
			if err != nil {
				return err
			}
			m.Image.ImageRef = img.ID
		}
	}
	return nil
}

// StartContainer implements the CRI.
func (s *Server) StartContainer(ctx context.Context, req *v1.StartContainerRequest) (*v1.StartContainerResponse, error) {
	r, err := s.cfg.Engine.PodContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if st := containerState(r); st != v1.ContainerState_CONTAINER_CREATED {
		return nil, fault.New(fault.Conflict, "cannot start container %s: it is in state %s", r.ID, st)
	}
	return &v1.StartContainerResponse{}, s.cfg.Engine.ContainerStart(ctx, r.ID, engine.StartOptions{})
}

// StopContainer implements the CRI.
func (s *Server) StopContainer(ctx context.Context, req *v1.StopContainerRequest) (*v1.StopContainerResponse, error) {
	if req.GetContainerId() == "" {
		return nil, invalid("cannot stop a container: its id must be given")
	}
	return &v1.StopContainerResponse{}, s.cfg.Engine.PodContainerStop(ctx, req.GetContainerId(), req.GetTimeout())
}

// RemoveContainer implements the CRI.
func (s *Server) RemoveContainer(ctx context.Context, req *v1.RemoveContainerRequest) (*v1.RemoveContainerResponse, error) {
	if req.GetContainerId() == "" {
		return nil, invalid("cannot remove a container: its id must be given")
	}
	return &v1.RemoveContainerResponse{}, s.cfg.Engine.PodContainerRemove(ctx, req.GetContainerId())
}

// startFailed tells that a container was to be started and could not be.
func startFailed(r *container.Record) bool {
	return r.State.Status == mcontainer.StateCreated && r.State.Error != ""
}

func containerState(r *container.Record) v1.ContainerState {
	switch r.State.Status {
	case mcontainer.StateCreated:
		if startFailed(r) {
			return v1.ContainerState_CONTAINER_EXITED
		}
		return v1.ContainerState_CONTAINER_CREATED
	case mcontainer.StateRunning, mcontainer.StatePaused, mcontainer.StateRestarting:
		return v1.ContainerState_CONTAINER_RUNNING
	case mcontainer.StateExited, mcontainer.StateDead, mcontainer.StateRemoving:
		return v1.ContainerState_CONTAINER_EXITED
	}
	return v1.ContainerState_CONTAINER_UNKNOWN
}

// spec is the image as the client asked for it.
func spec(c *v1.ContainerConfig) *v1.ImageSpec {
	i := &v1.ImageSpec{
		Image: c.GetImage().GetImage(), Annotations: c.GetImage().GetAnnotations(), UserSpecifiedImage: c.GetImage().GetUserSpecifiedImage(),
		RuntimeHandler: c.GetImage().GetRuntimeHandler(),
	}
	if i.UserSpecifiedImage != "" {
		i.Image = i.UserSpecifiedImage
	}
	return i
}

// listContainers are those that a filter lets through.
func (s *Server) listContainers(f *v1.ContainerFilter) []*v1.Container {
	var out []*v1.Container
	add := func(r *container.Record) {
		if st := f.GetState(); st != nil && st.GetState() != containerState(r) {
			return
		}
		c := s.edges.get(r)
		if !hasLabels(c.GetLabels(), f.GetLabelSelector()) {
			return
		}
		out = append(out, &v1.Container{
			Id: r.ID, PodSandboxId: r.Pod.Pod, Metadata: c.GetMetadata(), Image: spec(c), ImageRef: c.GetImage().GetImageRef(), State: containerState(r),
			CreatedAt: r.Created.UnixNano(), Labels: c.GetLabels(), Annotations: c.GetAnnotations(), ImageId: r.Image.ID,
		})
	}
	podID := f.GetPodSandboxId()
	if podID != "" {
		p, err := s.cfg.Engine.Pod(podID)
		if err != nil {
			return nil
		}
		podID = p.ID
	}
	if id := f.GetId(); id != "" {
		if r, err := s.cfg.Engine.PodContainer(id); err == nil && (podID == "" || r.Pod.Pod == podID) {
			add(r)
		}
		return out
	}
	all := s.cfg.Engine.PodContainers(podID)
	for _, r := range all {
		add(r)
	}
	if podID == "" {
		s.forget(all)
	}
	return out
}

// forget drops what is remembered of containers that are gone.
func (s *Server) forget(all []*container.Record) {
	s.edges.mu.Lock()
	many := len(s.edges.m) > 2*len(all)+64
	s.edges.mu.Unlock()
	if !many {
		return
	}
	exists := make(map[string]bool, len(all))
	for _, r := range all {
		exists[r.ID] = true
	}
	s.edges.keep(func(id string) bool { return exists[id] })
	s.rates.keep(func(id string) bool { return exists[id] })
}

// ListContainers implements the CRI.
func (s *Server) ListContainers(_ context.Context, req *v1.ListContainersRequest) (*v1.ListContainersResponse, error) {
	return &v1.ListContainersResponse{Containers: s.listContainers(req.GetFilter())}, nil
}

// ContainerStatus implements the CRI.
func (s *Server) ContainerStatus(_ context.Context, req *v1.ContainerStatusRequest) (*v1.ContainerStatusResponse, error) {
	r, err := s.cfg.Engine.PodContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &v1.ContainerStatusResponse{Status: s.containerStatus(r)}
	if req.GetVerbose() {
		info := struct {
			SandboxID   string `json:"sandboxID"`
			Pid         int    `json:"pid"`
			RuntimeType string `json:"runtimeType"`
			Record      *container.Record
		}{r.Pod.Pod, r.State.Pid, r.HostConfig.Runtime, withoutSecrets(r)}
		b, err := json.Marshal(info)
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(b)}
	}
	return resp, nil
}

// withoutSecrets leaves out the values of variables, which may be secrets.
func withoutSecrets(r *container.Record) *container.Record {
	n := r.Clone()
	m, c := *r.Pod, *r.Config
	m.Edge, c.Env = nil, nil
	n.Pod, n.Config = &m, &c
	return n
}

func (s *Server) containerStatus(r *container.Record) *v1.ContainerStatus {
	c := s.edges.get(r)
	st := &v1.ContainerStatus{
		Id: r.ID, Metadata: c.GetMetadata(), State: containerState(r), CreatedAt: r.Created.UnixNano(), Image: spec(c), ImageRef: c.GetImage().GetImageRef(),
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Mounts: c.GetMounts(), LogPath: r.Pod.Log, ImageId: r.Image.ID, StopSignal: statusSignal(c, r),
		Resources: resourcesOf(r),
	}
	if u := r.Pod.User; u != nil {
		l := &v1.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
		for _, g := range u.Groups {
			if !slices.Contains(l.SupplementalGroups, int64(g)) {
				l.SupplementalGroups = append(l.SupplementalGroups, int64(g))
			}
		}
		st.User = &v1.ContainerUser{Linux: l}
	}
	if st.State == v1.ContainerState_CONTAINER_CREATED {
		return st
	}
	if !r.State.StartedAt.IsZero() {
		st.StartedAt = r.State.StartedAt.UnixNano()
	}
	if st.State == v1.ContainerState_CONTAINER_RUNNING {
		return st
	}
	st.ExitCode, st.Message = int32(r.State.ExitCode), r.State.Error
	if !r.State.FinishedAt.IsZero() {
		st.FinishedAt = r.State.FinishedAt.UnixNano()
	}
	switch {
	case startFailed(r):
		st.Reason, st.ExitCode, st.FinishedAt = "StartError", 128, max(st.FinishedAt, st.CreatedAt)
	case r.State.OOMKilled:
		st.Reason = "OOMKilled"
	case r.State.ExitCode == 0:
		st.Reason = "Completed"
	default:
		st.Reason = "Error"
	}
	return st
}

// resourcesOf are the limits that a container has now.
func resourcesOf(r *container.Record) *v1.ContainerResources {
	h := r.HostConfig
	l := &v1.LinuxContainerResources{
		CpuPeriod: h.CPUPeriod, CpuQuota: h.CPUQuota, CpuShares: h.CPUShares, MemoryLimitInBytes: h.Memory, OomScoreAdj: int64(h.OomScoreAdj),
		CpusetCpus: h.CpusetCpus, CpusetMems: h.CpusetMems, Unified: r.Pod.Unified, MemorySwapLimitInBytes: h.MemorySwap,
	}
	for size, limit := range r.Pod.Hugepages {
		l.HugepageLimits = append(l.HugepageLimits, &v1.HugepageLimit{PageSize: size, Limit: limit})
	}
	return &v1.ContainerResources{Linux: l}
}

// UpdateContainerResources implements the CRI.
func (s *Server) UpdateContainerResources(ctx context.Context, req *v1.UpdateContainerResourcesRequest) (*v1.UpdateContainerResourcesResponse, error) {
	r, err := s.cfg.Engine.PodContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetLinux() == nil {
		return &v1.UpdateContainerResourcesResponse{}, nil
	}
	res, huge, unified, err := resources(req.GetLinux())
	if err != nil {
		return nil, err
	}
	kept := proto.CloneOf(s.edges.get(r))
	if len(req.GetAnnotations()) > 0 {
		if kept.Annotations == nil {
			kept.Annotations = map[string]string{}
		}
		for k, v := range req.GetAnnotations() {
			kept.Annotations[k] = v
		}
	}
	b, err := proto.Marshal(kept)
	if err != nil {
		return nil, err
	}
	return &v1.UpdateContainerResourcesResponse{}, s.cfg.Engine.PodContainerUpdate(ctx, r.ID, res, huge, unified, b)
}

// ReopenContainerLog implements the CRI.
func (s *Server) ReopenContainerLog(ctx context.Context, req *v1.ReopenContainerLogRequest) (*v1.ReopenContainerLogResponse, error) {
	return &v1.ReopenContainerLogResponse{}, s.cfg.Engine.PodContainerReopenLog(ctx, req.GetContainerId())
}

// CheckpointContainer implements the CRI.
func (s *Server) CheckpointContainer(ctx context.Context, req *v1.CheckpointContainerRequest) (*v1.CheckpointContainerResponse, error) {
	r, err := s.cfg.Engine.PodContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if t := req.GetTimeout(); t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(t)*time.Second)
		defer cancel()
	}
	return &v1.CheckpointContainerResponse{}, s.cfg.Engine.PodContainerCheckpoint(ctx, r.ID, req.GetLocation())
}

// maxOutput is where ExecSync cuts output off, as the CRI demands.
const maxOutput = 16 << 20

// capped keeps the beginning of what is written to it.
type capped struct{ bytes.Buffer }

func (c *capped) Write(p []byte) (int, error) {
	if room := maxOutput - c.Len(); room > 0 {
		c.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

// ExecSync implements the CRI.
func (s *Server) ExecSync(ctx context.Context, req *v1.ExecSyncRequest) (*v1.ExecSyncResponse, error) {
	if t := req.GetTimeout(); t < 0 {
		return nil, invalid("cannot exec: the timeout %d is negative", t)
	} else if t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(min(t, 1<<31))*time.Second)
		defer cancel()
	}
	var out, errs capped
	exit, err := s.cfg.Engine.PodContainerExec(ctx, req.GetContainerId(), engine.PodExec{Cmd: req.GetCmd(), Stdout: &out, Stderr: &errs})
	if err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fault.New(fault.DeadlineExceeded, "timeout %ds exceeded: %w", req.GetTimeout(), err)
		}
		return nil, err
	}
	// Both go into one message, which has a limit of its own.
	if room := maxMessage - 1<<10; out.Len()+errs.Len() > room {
		errs.Truncate(min(errs.Len(), room/2))
		out.Truncate(min(out.Len(), room-errs.Len()))
	}
	return &v1.ExecSyncResponse{Stdout: out.Bytes(), Stderr: errs.Bytes(), ExitCode: int32(exit)}, nil
}
