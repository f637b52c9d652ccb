package dockerapi

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"

	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// VolumeCopies is implemented by the engine.
type VolumeCopies interface {
	VolumeBackup(ctx context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) (api.VolumeArchive, error)
	VolumeExport(ctx context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) error
	VolumeRestore(ctx context.Context, name string, o engine.RestoreOptions, r io.Reader) (api.VolumeArchive, error)
	VolumeImport(ctx context.Context, name string, o engine.RestoreOptions, r io.Reader) error
	VolumeClone(ctx context.Context, name string, o api.VolumeClone) (*volume.Volume, error)
}

// volumeCopiesAPI serves backups, exports and clones of volumes.
type volumeCopiesAPI struct{ b VolumeCopies }

// out streams a volume; an error after the first byte cuts the connection, so that
// half an archive is never taken for a whole one.
func (a volumeCopiesAPI) out(w *response, r *request, mediaType string, fn func(engine.CopyVolumeOptions, io.Writer) error) error {
	s := newStream(w, mediaType, 0)
	defer s.end()
	o := engine.CopyVolumeOptions{Pause: r.flag("pause")}
	if r.flag("size") {
		o.Size = func(n int64) { s.header.Set(api.HeaderVolumeSize, strconv.FormatInt(n, 10)) }
	}
	return fn(o, s)
}

func (a volumeCopiesAPI) backup(w *response, r *request) error {
	return a.out(w, r, "application/zstd", func(o engine.CopyVolumeOptions, out io.Writer) error {
		_, err := a.b.VolumeBackup(r.Context(), r.name, o, out)
		return err
	})
}

func (a volumeCopiesAPI) export(w *response, r *request) error {
	return a.out(w, r, "application/x-tar", func(o engine.CopyVolumeOptions, out io.Writer) error {
		return a.b.VolumeExport(r.Context(), r.name, o, out)
	})
}

func (a volumeCopiesAPI) restore(w *response, r *request) error {
	rep, err := a.b.VolumeRestore(r.Context(), r.name, engine.RestoreOptions{Replace: r.flag("replace"), Devices: r.flag("devices")}, r.Body)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}

func (a volumeCopiesAPI) imports(w *response, r *request) error {
	o := engine.RestoreOptions{Replace: r.flag("replace"), Devices: r.flag("devices")}
	if q := r.query.Get("labels"); q != "" {
		if err := json.Unmarshal([]byte(q), &o.Labels); err != nil {
			return fault.New(fault.Invalid, "cannot read the labels: %w", err)
		}
	}
	if err := a.b.VolumeImport(r.Context(), r.name, o, r.Body); err != nil {
		return err
	}
	return w.noContent()
}

func (a volumeCopiesAPI) clone(w *response, r *request) error {
	var o api.VolumeClone
	if err := r.decode(w, &o); err != nil {
		return err
	}
	if err := checkName(o.Name); err != nil {
		return err
	}
	v, err := a.b.VolumeClone(r.Context(), r.name, o)
	if err != nil {
		return err
	}
	return w.json(http.StatusCreated, v)
}
