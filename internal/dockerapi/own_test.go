package dockerapi

import (
	"context"
	"io"

	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
)

// ownCases has lines for routes below /servin/.
var ownCases = []routeCase{
	{method: "GET", path: "/servin/volumes/v/backup?pause=1&size=1", status: 200, call: "backup v pause=true", answer: "archive"},
	{method: "GET", path: "/servin/volumes/v/export", status: 200, call: "export v pause=false", answer: "tar"},
	{method: "POST", path: "/servin/volumes/v/restore?replace=1", body: "abc", status: 200, call: "restore v replace=true devices=false abc", answer: `"SHA256":"s"`},
	{method: "POST", path: "/servin/volumes/v/import?devices=1", body: "abc", status: 204, call: "import v replace=false devices=true abc"},
	{method: "POST", path: "/servin/volumes/v/clone", body: `{"Name":"w","Pause":true}`, status: 201, call: "clone v w pause=true", answer: `"Name":"w"`},
}

func (f *fake) VolumeBackup(_ context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) (api.VolumeArchive, error) {
	if o.Size != nil {
		o.Size(7)
	}
	if err := f.call("backup %s pause=%t", name, o.Pause); err != nil {
		return api.VolumeArchive{}, err
	}
	_, err := io.WriteString(w, "archive")
	return api.VolumeArchive{}, err
}

func (f *fake) VolumeExport(_ context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) error {
	if err := f.call("export %s pause=%t", name, o.Pause); err != nil {
		return err
	}
	_, err := io.WriteString(w, "tar")
	return err
}

func (f *fake) VolumeRestore(_ context.Context, name string, o engine.RestoreOptions, r io.Reader) (api.VolumeArchive, error) {
	b, _ := io.ReadAll(r)
	return api.VolumeArchive{SHA256: "s"}, f.call("restore %s replace=%t devices=%t %s", name, o.Replace, o.Devices, b)
}

func (f *fake) VolumeImport(_ context.Context, name string, o engine.RestoreOptions, r io.Reader) error {
	b, _ := io.ReadAll(r)
	return f.call("import %s replace=%t devices=%t %s", name, o.Replace, o.Devices, b)
}

func (f *fake) VolumeClone(_ context.Context, name string, o api.VolumeClone) (*volume.Volume, error) {
	return &volume.Volume{Name: o.Name}, f.call("clone %s %s pause=%t", name, o.Name, o.Pause)
}
