"""First and second derivatives in closed form, for Hessian products by reverse-over-reverse differentiation."""

from curvlib.curvature.closed_form.functions import ClosedForm as ClosedForm
from curvlib.curvature.closed_form.layers import fused as fused
