// Package contract is what servind and servin-buildd say to each other beside
// containerd's own services: settings, layers that are had without unpacking them
// twice, and networks for build steps. servind serves it on a socket pair that
// servin-buildd inherits; nobody else can connect. Both programs import it.
package contract

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs/pkg/errgrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/cloudos-io/cloudos/internal/image"
)

// Descriptors that servin-buildd inherits: the socket to the engine's services,
// the listening socket for requests to itself, and the socket over which it is
// handed clients' connections.
const (
	FDEngine = 3
	FDListen = 4
	FDHanded = 5
)

// MaxHanded is the size of a message on FDHanded: what was read from a connection,
// with two descriptors: the connection, and one to be closed when that is done with.
const MaxHanded = 64 << 10

// Upgrades tells of a path whether its connections are handed over: whoever is there
// speaks another protocol from then on.
func Upgrades(path string) bool { return path == "/session" || path == "/grpc" }

// Snapshotter names the engine's snapshotter. HistoryNamespace is where BuildKit has
// its history, which the builder keeps itself.
const (
	Snapshotter      = "overlayfs"
	HistoryNamespace = image.Namespace + "_history"
)

// VersionHeader carries the API version that a client asked for.
const VersionHeader = "Servin-Api-Version"

// CallerHeader is on each request that is handed on: a name for who asked, good for
// as long as the request lasts.
const CallerHeader = "Servin-Build-Caller"

// ConfinedHeader says, escaped as in a query, why a client's build steps may have neither the
// host's privileges nor its network. The engine sets it, and removes a client's.
const ConfinedHeader = "Servin-Confined"

// Settings is all that a builder needs to know. It has no secrets.
type Settings struct {
	// Root keeps the build cache's records, RunRoot what a reboot may take.
	Root, RunRoot string
	Registries    image.Registries
	// Runtimes are OCI runtimes to use, the first that is found.
	Runtimes []string
	// CgroupParent is the parent of build steps' cgroups, "" none.
	CgroupParent string
	AppArmor     string
	Rootless     bool
	// Bridge tells whether the engine has a network to attach steps to.
	Bridge bool
	// Gateway is the host's address there, which the name host-gateway stands for.
	Gateway string
	// Nameservers, Search and Options override the host's resolv.conf.
	Nameservers, Search, Options []string
	// Budget is how many bytes of cache are kept, MinFree how many bytes of the
	// disk are to stay free. 0 is a default.
	Budget, MinFree int64
	// Version of the engine, and its name among others.
	Version, Instance string
	// Tracing says where spans go.
	Tracing Tracing
}

// Tracing is the engine's configuration of it.
type Tracing struct {
	Endpoint string
	Headers  map[string]string
	Ratio    float64
}

// LayerRequest asks for a layer to be unpacked as the chain Chain.
type LayerRequest struct {
	Blob                  ocispec.Descriptor
	DiffID, Chain, Parent string
}

// AliasRequest asks for the snapshot From to be known as To on Parent, too.
type AliasRequest struct{ From, To, Parent string }

// AdoptRequest asks for an image just built to be made ready to run. Results tell
// which snapshots hold its layers, for each platform, the lowest first.
type AdoptRequest struct {
	Results [][]Adopted
	Image   string // name or digest
}

// Adopted is one layer: the snapshot holds what Chain names.
type Adopted struct{ Chain, Snapshot string }

// AttachRequest asks for a network for a step. FD is a descriptor of the caller's
// that is open on a network namespace.
type AttachRequest struct {
	ID, Hostname string
	FD           int
}

// AttachResponse says how names are resolved there; empty is as on the host.
type AttachResponse struct{ Nameservers []string }

// ReleaseRequest gives a network back.
type ReleaseRequest struct{ ID string }

// AdmitRequest asks whether a build may use an image that is not its own: a base,
// one to copy from, a frontend. Callers are those that build. Target and Manifest
// are digests of what the reference names and of what would be used of it; they are
// "" as long as no registry was asked.
type AdmitRequest struct {
	Callers               []string
	Ref, Target, Manifest string
}

// AdmitResponse tells with More that the question is to be asked again once the
// digests are known.
type AdmitResponse struct{ More bool }

// Engine is what servind does for a builder.
type Engine interface {
	Settings(ctx context.Context) (Settings, error)
	Layer(ctx context.Context, r LayerRequest) error
	Alias(ctx context.Context, r AliasRequest) error
	Adopt(ctx context.Context, r AdoptRequest) error
	Admit(ctx context.Context, r AdmitRequest) (AdmitResponse, error)
	// Chains names the layer chains that images have.
	Chains(ctx context.Context) ([]string, error)
	Collect(ctx context.Context) error
	Attach(ctx context.Context, r AttachRequest) (AttachResponse, error)
	Release(ctx context.Context, r ReleaseRequest) error
}

type none struct{}

const service = "io.servin.build.v1.Engine"

// Register serves e.
func Register(s grpc.ServiceRegistrar, e Engine) {
	s.RegisterService(&grpc.ServiceDesc{ServiceName: service, HandlerType: (*Engine)(nil), Methods: []grpc.MethodDesc{
		method("Settings", func(ctx context.Context, e Engine, _ none) (Settings, error) { return e.Settings(ctx) }),
		method("Layer", func(ctx context.Context, e Engine, r LayerRequest) (none, error) { return none{}, e.Layer(ctx, r) }),
		method("Alias", func(ctx context.Context, e Engine, r AliasRequest) (none, error) { return none{}, e.Alias(ctx, r) }),
		method("Adopt", func(ctx context.Context, e Engine, r AdoptRequest) (none, error) { return none{}, e.Adopt(ctx, r) }),
		method("Admit", func(ctx context.Context, e Engine, r AdmitRequest) (AdmitResponse, error) { return e.Admit(ctx, r) }),
		method("Chains", func(ctx context.Context, e Engine, _ none) ([]string, error) { return e.Chains(ctx) }),
		method("Collect", func(ctx context.Context, e Engine, _ none) (none, error) { return none{}, e.Collect(ctx) }),
		method("Attach", func(ctx context.Context, e Engine, r AttachRequest) (AttachResponse, error) { return e.Attach(ctx, r) }),
		method("Release", func(ctx context.Context, e Engine, r ReleaseRequest) (none, error) { return none{}, e.Release(ctx, r) }),
	}}, e)
}

// method is an operation whose request and answer travel as JSON.
func method[Q, A any](name string, do func(context.Context, Engine, Q) (A, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var in wrapperspb.BytesValue
		if err := dec(&in); err != nil {
			return nil, err
		}
		var q Q
		if err := json.Unmarshal(in.Value, &q); err != nil {
			return nil, err
		}
		a, err := do(ctx, srv.(Engine), q)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		b, err := json.Marshal(a)
		return wrapperspb.Bytes(b), err
	}}
}

// Client is Engine over a connection.
type Client struct{ Conn grpc.ClientConnInterface }

var _ Engine = Client{}

func call[A any](ctx context.Context, c Client, name string, q any) (a A, err error) {
	b, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	var out wrapperspb.BytesValue
	if err := c.Conn.Invoke(ctx, "/"+service+"/"+name, wrapperspb.Bytes(b), &out); err != nil {
		return a, errgrpc.ToNative(err)
	}
	if err := json.Unmarshal(out.Value, &a); err != nil {
		return a, fmt.Errorf("cannot read the engine's answer: %w", err)
	}
	return a, nil
}

// Settings asks for the settings.
func (c Client) Settings(ctx context.Context) (Settings, error) {
	return call[Settings](ctx, c, "Settings", none{})
}

// Layer has a layer unpacked.
func (c Client) Layer(ctx context.Context, r LayerRequest) error {
	_, err := call[none](ctx, c, "Layer", r)
	return err
}

// Alias gives a snapshot a second name.
func (c Client) Alias(ctx context.Context, r AliasRequest) error {
	_, err := call[none](ctx, c, "Alias", r)
	return err
}

// Adopt makes an image ready.
func (c Client) Adopt(ctx context.Context, r AdoptRequest) error {
	_, err := call[none](ctx, c, "Adopt", r)
	return err
}

// Admit asks whether an image may be used.
func (c Client) Admit(ctx context.Context, r AdmitRequest) (AdmitResponse, error) {
	return call[AdmitResponse](ctx, c, "Admit", r)
}

// Chains asks which layer chains images have.
func (c Client) Chains(ctx context.Context) ([]string, error) {
	return call[[]string](ctx, c, "Chains", none{})
}

// Collect removes what nothing refers to.
func (c Client) Collect(ctx context.Context) error {
	_, err := call[none](ctx, c, "Collect", none{})
	return err
}

// Attach connects a network namespace.
func (c Client) Attach(ctx context.Context, r AttachRequest) (AttachResponse, error) {
	return call[AttachResponse](ctx, c, "Attach", r)
}

// Release disconnects one.
func (c Client) Release(ctx context.Context, r ReleaseRequest) error {
	_, err := call[none](ctx, c, "Release", r)
	return err
}
