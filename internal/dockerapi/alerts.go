package dockerapi

import (
	"context"
	"net/http"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Alerts is what watches alert rules.
type Alerts interface {
	List() api.Alerts
	Test(ctx context.Context, what string) ([]api.AlertTest, error)
}

type alertAPI struct{ alerts Alerts }

func (a alertAPI) have() error {
	if a.alerts == nil {
		return fault.New(fault.NotFound, "this engine has no alert rules: name a file of them with \"alerts:\" in its configuration")
	}
	return nil
}

func (a alertAPI) list(w *response, _ *request) error {
	if err := a.have(); err != nil {
		return err
	}
	return w.json(http.StatusOK, a.alerts.List())
}

func (a alertAPI) test(w *response, r *request) error {
	if err := a.have(); err != nil {
		return err
	}
	l, err := a.alerts.Test(r.Context(), r.name)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, l)
}
