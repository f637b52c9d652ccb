package engine

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/checkpoint"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// PodContainerCheckpoint writes a pod's container, which goes on, to a tar at an
// absolute path, in the layout that the other runtimes of the kubelet use: CRIU's
// images in checkpoint/, the writable layer in rootfs-diff.tar, config.dump and
// spec.dump.
func (e *Engine) PodContainerCheckpoint(ctx context.Context, id, location string) error {
	if !filepath.IsAbs(location) {
		return fault.New(fault.Invalid, "cannot checkpoint container %s: location %.128q is not absolute", id, location)
	}
	u, t, c, err := e.checkpointer(ctx, id)
	if err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	// No longer to be broken off.
	ctx = context.WithoutCancel(ctx)
	d, err := e.streamDraft(u)
	if err != nil {
		return checkpointFailed(r, err)
	}
	defer d.close()
	d.logs = true
	h, err := e.still(ctx, u, t, c)
	if err != nil {
		return checkpointFailed(r, err)
	}
	defer h.letGo(ctx)
	m := e.manifest(r, false)
	if err := d.round(ctx, c, false); err != nil {
		return checkpointFailed(r, err)
	}
	if err := d.files(ctx, r, m); err != nil {
		return checkpointFailed(r, err)
	}
	kind := fault.Invalid // where it cannot be written to at all
	err = durable.Replace(location, 0o600, durable.Everything, func(f *os.File) error {
		kind = fault.Internal
		return e.podArchive(f, r, d, m.Created)
	})
	if err != nil {
		return checkpointFailed(r, fault.New(kind, "cannot write %s: %w", location, err))
	}
	return nil
}

// podArchive writes the tar.
func (e *Engine) podArchive(w io.Writer, r *container.Record, d *draft, at time.Time) error {
	tw := tar.NewWriter(w)
	spec, err := e.describedSpec(r)
	if err != nil {
		return err
	}
	conf := map[string]any{
		"id": r.ID, "name": r.Name, "rootfsImage": r.Image.Ref, "rootfsImageRef": r.Image.ID, "rootfsImageName": r.Image.Ref,
		"runtime": nativeRuntime, "createdTime": r.Created, "checkpointedTime": at, "restored": false,
	}
	for _, x := range []struct {
		name string
		v    any
	}{{"spec.dump", spec}, {"config.dump", conf}} {
		b, err := json.MarshalIndent(x.v, "", " ")
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{Name: x.name, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(b)), ModTime: at}); err != nil {
			return err
		}
		if _, err := tw.Write(b); err != nil {
			return err
		}
	}
	images := filepath.Join(d.path, checkpoint.RoundDir(d.rounds))
	if err := tw.WriteHeader(&tar.Header{Name: "checkpoint/", Typeflag: tar.TypeDir, Mode: 0o700, ModTime: at}); err != nil {
		return err
	}
	err = filepath.WalkDir(images, func(p string, x fs.DirEntry, err error) error {
		if err != nil || !x.Type().IsRegular() {
			return err
		}
		return addFile(tw, p, "checkpoint/"+x.Name(), at)
	})
	for _, name := range criuLogs() {
		if lerr := addFile(tw, filepath.Join(d.path, name), name, at); lerr != nil && !errors.Is(lerr, fs.ErrNotExist) {
			err = errors.Join(err, lerr)
		}
	}
	if err == nil {
		err = addFile(tw, filepath.Join(d.path, checkpoint.LayerName), "rootfs-diff.tar", at)
	}
	return errors.Join(err, tw.Close())
}

func addFile(tw *tar.Writer, path, name string, at time.Time) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: st.Size(), ModTime: at}); err != nil {
		return err
	}
	_, err = io.CopyN(tw, f, st.Size())
	return err
}

// describedSpec is a container's spec for whoever reads about it: made of its
// configuration, without what only a start finds out.
func (e *Engine) describedSpec(r *container.Record) (*specs.Spec, error) {
	hc := *r.HostConfig
	hc.Devices, hc.DeviceRequests = nil, nil
	if r.Pod != nil { // whose namespaces are the pod's, which lie nowhere for others
		hc.NetworkMode, hc.IpcMode, hc.PidMode, hc.UTSMode = "none", "private", "", ""
	}
	in := oci.Input{
		ID: r.ID, Name: r.Name, Config: r.Config, HostConfig: &hc, IDMap: idMap(r), CgroupPath: e.cgroupPath(r), CgroupV2: e.cfg.CgroupV2,
		Devices: oci.DevicesAt, Host: e.cfg.Host, Seccomp: e.cfg.Profiles, NoNewPrivileges: e.cfg.NoNewPrivileges,
	}
	for _, p := range r.Mounts {
		in.Mounts = append(in.Mounts, oci.Mount{Type: string(p.Type), Source: p.Source, Target: p.Target, ReadOnly: p.ReadOnly, Options: p.Options})
	}
	spec, _, err := oci.Generate(in)
	if err != nil {
		return nil, err
	}
	if r.Pod != nil {
		spec.Annotations = map[string]string{
			"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": strings.TrimPrefix(r.Name, "/"),
			"io.kubernetes.cri.sandbox-id": r.Pod.Pod, "io.kubernetes.cri.image-name": r.Image.Ref,
		}
	}
	return spec, nil
}
