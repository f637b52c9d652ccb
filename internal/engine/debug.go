package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// targetDir is where a container that looks into another sees its files.
const targetDir = "target"

// debugCaps are what looking into a container takes beyond the default: to see
// its root through /proc, to trace its processes, and to look at its network.
var debugCaps = []string{"SYS_PTRACE", "NET_ADMIN", "NET_RAW"}

// debugging completes the request of a container that looks into another. It runs
// from an image of its own, in a mount namespace of its own: nothing is put into
// the other's file system.
func (e *Engine) debugging(ctx context.Context, req *CreateRequest, hc *mcontainer.HostConfig) error {
	if req.Extra.Debug == debugshell.Target {
		return e.debuggingHost(ctx, req, hc)
	}
	t, err := e.lookup(req.Extra.Debug)
	if err != nil {
		return err
	}
	tr := t.rec.Load()
	if tr.Extra.Debug != "" {
		return fault.New(fault.Invalid, "cannot debug container %s: it looks into another itself", tr.Name)
	}
	req.Extra.Debug = t.id
	if err := e.tools(ctx, req.Config, hc, t.id); err != nil {
		return err
	}
	for _, c := range debugCaps {
		if !slices.Contains(hc.CapAdd, c) {
			hc.CapAdd = append(hc.CapAdd, c)
		}
	}
	if t.running() == nil {
		if hc.NetworkMode == "" {
			hc.NetworkMode = "none"
		}
		return nil
	}
	same := "container:" + t.id
	hc.PidMode, hc.NetworkMode = mcontainer.PidMode(same), mcontainer.NetworkMode(same)
	if tr.HostConfig.IpcMode.IsShareable() {
		hc.IpcMode = mcontainer.IpcMode(same)
	} else if tr.HostConfig.IpcMode.IsHost() {
		hc.IpcMode = "host"
	}
	if tr.HostConfig.UsernsMode.IsHost() {
		hc.UsernsMode = "host"
	}
	return nil
}

// tools makes a container one that looks into a target: with the engine's tools where no
// image is named, with the label, gone when it ends.
func (e *Engine) tools(ctx context.Context, cfg *mcontainer.Config, hc *mcontainer.HostConfig, target string) error {
	if cfg.Image == "" {
		if err := e.toolbox(ctx); err != nil {
			return err
		}
		cfg.Image = api.ToolboxImage
	}
	labels := map[string]string{api.LabelDebug: target}
	for k, v := range cfg.Labels {
		if k != api.LabelDebug {
			labels[k] = v
		}
	}
	cfg.Labels = labels
	hc.AutoRemove, hc.RestartPolicy = true, mcontainer.RestartPolicy{}
	return nil
}

// toolbox has the image with the engine's own tools in the store, from the file
// that is shipped beside the engine.
func (e *Engine) toolbox(ctx context.Context) error {
	_, err := e.cfg.Images.Resolve(ctx, api.ToolboxImage, "")
	if !fault.Is(err, fault.NotFound) {
		return err
	}
	missing := func(why error) error {
		return fault.New(fault.Unsupported, "cannot debug without an image: the engine's own tools are not installed (%w); install servin-toolbox beside servind, or name an image with --image", why)
	}
	if e.cfg.Toolbox == "" {
		return missing(os.ErrNotExist)
	}
	f, err := os.Open(e.cfg.Toolbox)
	if err != nil {
		return missing(err)
	}
	defer f.Close()
	if _, err := e.cfg.Images.Load(ctx, bufio.NewReader(f), nil, nil); err != nil {
		return fmt.Errorf("cannot load the engine's tools: %w", err)
	}
	_, err = e.cfg.Images.Resolve(ctx, api.ToolboxImage, "")
	return err
}

// debugTarget makes the other container's files visible: those of one that runs
// through its process, which is in the shared pid namespace, so that its mounts
// are as it has them; those of one that does not run as a read-only mount.
func (e *Engine) debugTarget(ctx context.Context, u *unit, r *container.Record, root *os.File, back *scope) ([]oci.Mount, error) {
	if r.Extra.Debug == debugshell.Target {
		return nil, e.debugHost(ctx, u, r, root)
	}
	t, err := e.lookup(r.Extra.Debug)
	if err != nil {
		return nil, err
	}
	if r.HostConfig.PidMode.IsContainer() {
		task := t.running()
		if task == nil {
			return nil, fault.New(fault.Conflict, "cannot debug container %s: it has just ended; try again to look at its files", t.rec.Load().Name)
		}
		pid, err := innerPid(task.Pid())
		if err != nil {
			return nil, fault.New(fault.Conflict, "cannot debug container %s: %w", t.rec.Load().Name, err)
		}
		return nil, linkRoot(pid, r, root)
	}
	f, err := e.cfg.Snapshots.Mount(ctx, t.id, true, idMap(r))
	if err != nil {
		return nil, fmt.Errorf("cannot mount the files of container %s: %w", t.rec.Load().Name, err)
	}
	defer f.Close()
	back.add(func(context.Context) { _ = e.dropHostMounts(u) })
	dir := filepath.Join(e.hostDir(u), "target")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("cannot mount the files of container %s: %w", t.rec.Load().Name, err)
	}
	return []oci.Mount{{Type: "bind", Source: dir, Target: "/" + targetDir, ReadOnly: true}}, nil
}

// linkRoot makes the files of a process visible through it.
func linkRoot(pid int, r *container.Record, root *os.File) error {
	err := unix.Symlinkat("/proc/"+strconv.Itoa(pid)+"/root", int(root.Fd()), targetDir)
	if errors.Is(err, unix.EEXIST) {
		return fault.New(fault.Invalid, "cannot debug with image %s: it has a /%s of its own", r.Image.Ref, targetDir)
	}
	if err != nil {
		return fmt.Errorf("cannot link the target's files: %w", err)
	}
	return nil
}

// innerPid is a process's number in its own pid namespace.
func innerPid(pid int) (int, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(rest)
			if len(f) > 0 {
				return strconv.Atoi(f[len(f)-1])
			}
		}
	}
	return 0, errors.New("the kernel does not tell its number")
}
