package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// pauseProgram is the name of the program that holds a pod's processes together,
// in a root directory that holds nothing else.
const pauseProgram = "servin-pause"

// pauseRoot makes that directory, once, and gives a detached mount of it. The
// program is the shim under another name: it reaps what its pod orphans.
func (e *Engine) pauseRoot() (*os.File, error) {
	dir := filepath.Join(e.cfg.Root, "pause")
	program := filepath.Join(dir, pauseProgram)
	if err := e.writePause(dir, program); err != nil {
		return nil, fmt.Errorf("cannot write the pause program: %w", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot mount the pause program: %w", err)
	}
	// Whatever the file system of the root is mounted with.
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Attr_clr: unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot mount the pause program: %w", err)
	}
	return os.NewFile(uintptr(fd), "pause"), nil
}

func (e *Engine) writePause(dir, program string) error {
	e.pods.pauseMu.Lock()
	defer e.pods.pauseMu.Unlock()
	if e.pods.paused {
		return nil
	}
	if e.cfg.Pause == nil {
		return fault.New(fault.Unsupported, "this engine has none")
	}
	for _, d := range []string{"proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	f, err := e.cfg.Pause()
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 16<<20))
	if err != nil {
		return err
	}
	// A new file each time the engine starts: pods of a former one keep theirs.
	if err := durable.WriteFile(program, b, 0o755, durable.Nothing); err != nil {
		return err
	}
	e.pods.paused = true
	return nil
}

// startPause starts the process that is init for all of a pod's containers.
func (e *Engine) startPause(ctx context.Context, p *pod, r *container.Pod) error {
	root, err := e.pauseRoot()
	if err != nil {
		return err
	}
	hc := &mcontainer.HostConfig{
		NetworkMode: "none", IpcMode: mcontainer.IPCModePrivate, ReadonlyRootfs: true, CapDrop: []string{"ALL"},
		SecurityOpt: []string{"no-new-privileges"}, OomScoreAdj: pauseOOMScore, Resources: mcontainer.Resources{CgroupParent: r.CgroupParent, OomKillDisable: new(bool)},
	}
	oci.ApplyDefaults(hc, e.cfg.Host, oci.Defaults{CgroupnsMode: mcontainer.CgroupnsModePrivate})
	rec := &container.Record{
		ID: p.id, Name: p.name, HostConfig: hc, UserNS: r.UserNS,
		Config: &mcontainer.Config{Entrypoint: []string{"/" + pauseProgram, "pause"}},
	}
	in := oci.Input{
		ID: p.id, Name: p.name, Config: rec.Config, HostConfig: hc, IDMap: idMap(rec), CgroupPath: e.cgroupPath(rec), CgroupV2: e.cfg.CgroupV2,
		Rootless: e.cfg.Rootless, Devices: oci.DevicesAt, Host: e.cfg.Host, Seccomp: e.cfg.Profiles, AppArmorProfile: e.cfg.AppArmorProfile,
		NoNewPrivileges: true, ShmSource: filepath.Join(p.dir, "shm"),
	}
	in.User.UID, in.User.GID = pauseUser, pauseUser
	var s scope
	defer s.close()
	if err := e.joinSet(p, r, &in, &s); err != nil {
		root.Close()
		return err
	}
	spec, _, err := oci.Generate(in)
	if err != nil {
		root.Close()
		return err
	}
	t, err := e.cfg.Driver.Start(ctx, runtime.StartRequest{
		ID: p.id, Key: runtime.SandboxKey{CgroupParent: r.CgroupParent}, Spec: spec, RootFS: root, Log: runtime.Log{Format: "none"},
	})
	if err != nil {
		return fmt.Errorf("cannot start the pod's pause: %w", err)
	}
	e.setPause(p, t)
	return nil
}

// The pause is nobody's process, and the last to be killed for want of memory.
const (
	pauseUser     = 65535
	pauseOOMScore = -998
)

// setPause watches a pause: with it, the processes of all of the pod's containers end.
func (e *Engine) setPause(p *pod, t runtime.Task) {
	p.mu.Lock()
	p.pause = t
	p.mu.Unlock()
	e.spawn(func() {
		select {
		case <-t.Exited():
		case <-e.ctx.Done():
			return
		}
		p.mu.Lock()
		lost := p.pause == t
		if lost {
			p.pause = nil
		}
		p.mu.Unlock()
		if !lost {
			return
		}
		ctx, cancel := context.WithTimeout(e.background(), time.Minute)
		defer cancel()
		if err := t.Delete(ctx); err != nil {
			e.log.Warn("cannot clear what is left of a pod's pause", "pod", p.id, "cause", err)
		}
		if p.rec.Load().Ready {
			e.log.Error("a pod's pause ended; the pod is not ready any more", "pod", p.id)
			e.notReady(p)
			e.podEvent(p, events.ActionDie)
		}
	})
}

func (e *Engine) notReady(p *pod) {
	_, pend, err := e.changePod(p, func(n *container.Pod) { n.Ready = false })
	if err == nil {
		err = pend.Wait()
	}
	if err != nil {
		e.log.Error("cannot store a pod's state", "pod", p.id, "cause", err)
	}
}

// endPause ends it and removes what it leaves.
func (e *Engine) endPause(ctx context.Context, p *pod) {
	p.mu.Lock()
	t := p.pause
	p.pause = nil
	p.mu.Unlock()
	if t == nil {
		return
	}
	if err := t.Signal(ctx, int(unix.SIGKILL), false); err != nil && !gone(t) && !errors.Is(err, unix.ESRCH) {
		e.log.Warn("cannot end a pod's pause", "pod", p.id, "cause", err)
	}
	select {
	case <-t.Exited():
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
	}
	if err := t.Delete(ctx); err != nil {
		e.log.Warn("cannot clear what is left of a pod's pause", "pod", p.id, "cause", err)
	}
}
