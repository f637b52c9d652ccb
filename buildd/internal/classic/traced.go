package classic

import (
	"context"
	"errors"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/protobuf/proto"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"

	"github.com/cloudos-io/cloudos/buildd/internal/upload"
)

// traced builds for clients that speak BuildKit: their session has the context,
// secrets and logins, and gets results; the status goes out as it is.
func (b *Builder) traced(ctx context.Context, c *client.Client, o *options, tree *upload.Tree, out *output) {
	id := o.id
	if id == "" {
		id = identity.NewID()
	}
	sess := o.session
	if tree != nil {
		own, err := b.ownSession(ctx, o, tree)
		if err != nil {
			out.fail(err, "")
			return
		}
		defer own.Close()
		defer b.cfg.Callers.Set(own.ID(), o.caller)()
		sess = own.ID()
	} else if sess == "" {
		out.fail(errors.New("no session given for the build"), "")
		return
	}
	req := &controlapi.SolveRequest{
		Ref: id, Session: sess, Frontend: "dockerfile.v0", FrontendAttrs: o.attrs, Entitlements: o.entitlements,
		Cache: &controlapi.CacheOptions{},
	}
	for _, e := range o.cacheFrom {
		req.Cache.Imports = append(req.Cache.Imports, &controlapi.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	for _, e := range o.outputs {
		req.Exporters = append(req.Exporters, &controlapi.Exporter{Type: e.Type, Attrs: e.Attrs})
	}
	if len(req.Exporters) == 0 {
		req.Exporters = []*controlapi.Exporter{{Type: "moby", Attrs: map[string]string{"name": o.names()}}}
	}
	api := c.ControlClient()
	watch, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	told := make(chan struct{})
	go func() {
		defer close(told)
		st, err := api.Status(watch, &controlapi.StatusRequest{Ref: id})
		if err != nil {
			return
		}
		for {
			s, err := st.Recv()
			if err != nil {
				return
			}
			if p, err := proto.Marshal(s); err == nil {
				out.aux("moby.buildkit.trace", p)
			}
		}
	}()
	res, err := api.Solve(ctx, req)
	if err != nil {
		stop()
		<-told
		out.fail(grpcerrors.FromGRPC(err), "")
		return
	}
	<-told
	img := res.ExporterResponse[exptypes.ExporterImageConfigDigestKey]
	if img == "" {
		img = res.ExporterResponse[exptypes.ExporterImageDigestKey]
	}
	if img != "" {
		out.aux("moby.image.id", map[string]string{"ID": img})
	}
}

// ownSession stands in for a client that sent its context as a tar.
func (b *Builder) ownSession(ctx context.Context, o *options, tree *upload.Tree) (*session.Session, error) {
	s, err := session.NewSession(ctx, o.sharedKey(tree))
	if err != nil {
		return nil, err
	}
	s.Allow(o.auth())
	s.Allow(filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": fsutil.FS(tree), "dockerfile": fsutil.FS(tree)}))
	c, err := b.control(ctx)
	if err != nil {
		return nil, err
	}
	go func() { _ = s.Run(context.WithoutCancel(ctx), c.Dialer()) }()
	return s, nil
}
