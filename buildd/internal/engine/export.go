package engine

import (
	"context"
	"maps"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/progress"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// moby is how Docker's clients call the exporter to the engine's own images.
const moby = "moby"

// danglingPrefix begins the names of untagged images in the engine.
const danglingPrefix = "dangling"

// Worker is BuildKit's worker with the engine's exporter.
type Worker struct {
	*base.Worker
	engine contract.Engine
	md     *metadata.Store
	admit  admitter
}

var _ worker.Worker = (*Worker)(nil)

// NewWorker wraps w.
func (e *Engine) NewWorker(w *base.Worker, md *metadata.Store) *Worker {
	a := admitter{engine: e.Client, callers: &e.Callers, content: w.ContentStore()}
	w.SourceManager.Register(guarded{w.ImageSource, a})
	return &Worker{Worker: w, engine: e.Client, md: md, admit: a}
}

// Exporter finds an exporter by name.
func (w *Worker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	switch name {
	case moby, client.ExporterImage:
		x, err := w.Worker.Exporter(client.ExporterImage, sm)
		if err != nil {
			return nil, err
		}
		return imageExporter{x, w}, nil
	}
	return w.Worker.Exporter(name, sm)
}

// imageExporter makes images that the engine can run at once.
type imageExporter struct {
	exporter.Exporter
	w *Worker
}

// Resolve reads the exporter's options.
func (x imageExporter) Resolve(ctx context.Context, id int, opt map[string]string) (exporter.ExporterInstance, error) {
	opt = maps.Clone(opt)
	if opt == nil {
		opt = map[string]string{}
	}
	stored := opt[string(exptypes.OptKeyStore)] != "false"
	// What BuildKit would unpack is there already.
	delete(opt, string(exptypes.OptKeyUnpack))
	opt[string(exptypes.OptKeyDanglingPrefix)] = danglingPrefix
	opt[string(exptypes.OptKeyDanglingEmptyOnly)] = "true"
	i, err := x.Exporter.Resolve(ctx, id, opt)
	if err != nil {
		return nil, err
	}
	return imageInstance{ExporterInstance: i, w: x.w, stored: stored}, nil
}

type imageInstance struct {
	exporter.ExporterInstance
	w      *Worker
	stored bool
}

// Export makes the image and has the engine take over the layers.
func (i imageInstance) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (map[string]string, exporter.FinalizeFunc, exporter.DescriptorReference, error) {
	resp, fin, ref, err := i.ExporterInstance.Export(ctx, src, info)
	if err != nil || !i.stored {
		return resp, fin, ref, err
	}
	done := progress.OneOff(ctx, "handing over to the engine")
	if err := done(i.adopt(ctx, src, resp)); err != nil {
		if ref != nil {
			_ = ref.Release()
		}
		return nil, nil, nil, err
	}
	return resp, fin, ref, nil
}

func (i imageInstance) adopt(ctx context.Context, src *exporter.Source, resp map[string]string) error {
	refs := map[string]cache.ImmutableRef{}
	if src.Ref != nil {
		refs[src.Ref.ID()] = src.Ref
	}
	for _, r := range src.Refs {
		if r != nil {
			refs[r.ID()] = r
		}
	}
	req := contract.AdoptRequest{Image: resp[exptypes.ExporterImageDigestKey]}
	for _, r := range refs {
		req.Results = append(req.Results, i.w.layersOf(r))
	}
	return i.w.engine.Adopt(ctx, req)
}

// layersOf tells which snapshots hold the layers of a result.
func (w *Worker) layersOf(ref cache.ImmutableRef) []contract.Adopted {
	chain := ref.LayerChain()
	defer func() { _ = chain.Release(context.Background()) }()
	var out []contract.Adopted
	for _, r := range chain {
		si, ok := w.md.Get(r.ID())
		if !ok {
			return out
		}
		a := contract.Adopted{Snapshot: r.ID()}
		if v := si.Get("cache.snapshot"); v != nil {
			_ = v.Unmarshal(&a.Snapshot)
		}
		if v := si.Get("cache.chainID"); v == nil || v.Unmarshal(&a.Chain) != nil || a.Chain == "" {
			return out
		}
		out = append(out, a)
	}
	return out
}
